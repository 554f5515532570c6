# shellcheck shell=bash
# Sourced by the scripts beside it: one virtual environment in .venv, installed into when needed.
#
#   make_venv              finds a Python ≥ 3.11 and makes .venv, or takes the one that is there;
#                          sets VENV_PYTHON and PYTHON_VERSION ("3.11")
#   install NAME TARGET    installs TARGET unless this was done before for the same pyproject.toml

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"

say() { printf '==> %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

make_venv() {
  local wanted="Python 3.11 or newer"
  local remedy="install one, or name it: PYTHON=/path/to/python3.12 bash $0"
  if [[ ! -x "$VENV_PYTHON" ]]; then
    local python="${PYTHON:-python3}"
    command -v "$python" >/dev/null || die "no '$python' here, wanted $wanted; $remedy"
    is_new_enough "$python" ||
      die "$("$python" --version 2>&1) ($python) is too old, wanted $wanted; $remedy"
    [[ ! -e "$VENV" ]] || die "$VENV is there but has no Python; remove it and start again"
    say "making $VENV with $("$python" --version)"
    "$python" -m venv "$VENV" || {
      rm -rf "$VENV"
      die "'$python -m venv' failed; install the venv module (Debian, Ubuntu: python3-venv)"
    }
  fi
  is_new_enough "$VENV_PYTHON" ||
    die "$VENV holds $("$VENV_PYTHON" --version 2>&1), wanted $wanted; remove it and start again"
  # shellcheck disable=SC2034  # read by the scripts that source this
  PYTHON_VERSION="$("$VENV_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

# What an installation depends on: this folder (it is an editable one), what pyproject.toml asks
# for, and the interpreter.
fingerprint() {
  "$VENV_PYTHON" - "$ROOT" <<'PYTHON'
import hashlib, pathlib, sys

root = pathlib.Path(sys.argv[1])
text = f"{root}\n{sys.version}\n".encode() + (root / "pyproject.toml").read_bytes()
print(hashlib.sha256(text).hexdigest())
PYTHON
}

install() {
  local stamp="$VENV/.installed-$1" now
  now="$(fingerprint)"
  if [[ -f "$stamp" && "$(<"$stamp")" == "$now" ]]; then
    return
  fi
  say "installing $2 (minutes, the first time)"
  pip_install -e "$2" || die "the installation failed; see pip's message above"
  printf '%s\n' "$now" >"$stamp"
}

pip_install() { "$VENV_PYTHON" -m pip install -q --disable-pip-version-check "$@"; }
