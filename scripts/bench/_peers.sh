#!/usr/bin/env bash
# Makes the virtual environment of a peer and prints its interpreter; installed once.
#
#   PEER=$(bash scripts/bench/_peers.sh trl-1.16.0 [FOLDER])
#
# FOLDER is .cache/peers/trl-1.16.0 of this repository by default. PYTHON names the interpreter to
# make it with (python3.11 by default). The project's own .venv is not touched.

set -euo pipefail

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

peer="${1:-}"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${2:-$root/.cache/peers/$peer}"
python="${PYTHON:-python3.11}"

# What each peer is made of, one pip call a line: torch comes first, so that nothing else chooses it.
case "$peer" in
trl-1.16.0) steps=("torch==2.13.0" "trl==1.16.0 datasets") ;;
tunix-0.1.7) steps=("google-tunix==0.1.7") ;;
trl-1.12.0) steps=("torch==2.13.0" "trl==1.12.0 datasets") ;; # the last with a PPOTrainer
*) die "peer '$peer': known are trl-1.16.0, trl-1.12.0 and tunix-0.1.7" ;;
esac

if [[ ! -f "$folder/.installed" ]]; then
  command -v "$python" >/dev/null || die "no '$python' here; name another: PYTHON=… bash $0 $peer"
  "$python" -m venv "$folder" >&2
  for packages in "${steps[@]}"; do
    # shellcheck disable=SC2086  # several packages
    "$folder/bin/python" -m pip install -q --disable-pip-version-check $packages >&2
  done
  touch "$folder/.installed"
fi
printf '%s\n' "$folder/bin/python"
