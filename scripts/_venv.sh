# shellcheck shell=bash
# Sourced by the scripts beside it: a virtual environment, installed into when needed.
#
#   use_newest             before make_venv: .venv-newest, which takes what resolves today
#   make_venv              finds a Python ≥ 3.11 and makes .venv, or takes the one that is there;
#                          sets VENV_PYTHON, PYTHON_VERSION ("3.11") and CONSTRAINTS
#   install NAME TARGET    installs TARGET in the locked versions, unless this was done before for
#                          the same pyproject.toml and the same lock

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
VENV_PYTHON="$VENV/bin/python"
NEWEST=0
CONSTRAINTS=""

say() { printf '==> %s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

use_newest() {
  NEWEST=1
  VENV="$ROOT/.venv-newest"
  VENV_PYTHON="$VENV/bin/python"
}

# Sets PYTHON_COMMAND to a Python that is new enough.
find_python() {
  local wanted="Python 3.11 or newer"
  local remedy="install one, or name it: PYTHON=/path/to/python3.12 bash $0"
  PYTHON_COMMAND="${PYTHON:-python3}"
  command -v "$PYTHON_COMMAND" >/dev/null ||
    die "no '$PYTHON_COMMAND' here, wanted $wanted; $remedy"
  is_new_enough "$PYTHON_COMMAND" || die \
    "$("$PYTHON_COMMAND" --version 2>&1) ($PYTHON_COMMAND) is too old, wanted $wanted; $remedy"
}

make_venv() {
  if [[ -x "$VENV_PYTHON" && -n "${PYTHON:-}" ]]; then
    find_python
    remove_venv_of_another_python
  fi
  if [[ ! -x "$VENV_PYTHON" ]]; then
    find_python
    [[ ! -e "$VENV" ]] || die "$VENV is there but has no Python; remove it and start again"
    say "making $VENV with $("$PYTHON_COMMAND" --version)"
    "$PYTHON_COMMAND" -m venv "$VENV" || {
      rm -rf "$VENV"
      die "'$PYTHON_COMMAND -m venv' failed; install the venv module (Debian, Ubuntu: python3-venv)"
    }
  fi
  is_new_enough "$VENV_PYTHON" || die "$VENV holds $("$VENV_PYTHON" --version 2>&1)," \
    "wanted Python 3.11 or newer; remove it and start again"
  PYTHON_VERSION="$(version_of "$VENV_PYTHON")"
  CONSTRAINTS="$(constraints_of "$PYTHON_VERSION")"
  if [[ "$NEWEST" == 1 ]]; then
    CONSTRAINTS=""
  elif [[ ! -f "$CONSTRAINTS" ]]; then
    say "no locked versions for Python $PYTHON_VERSION (${CONSTRAINTS#"$ROOT/"}):" \
      "taking what resolves today"
    CONSTRAINTS=""
  fi
}

# PYTHON names another version than the environment has: one that these scripts made is made anew.
remove_venv_of_another_python() {
  local there wanted stamps
  there="$(version_of "$VENV_PYTHON")"
  wanted="$(version_of "$PYTHON_COMMAND")"
  [[ "$there" != "$wanted" ]] || return 0
  stamps=("$VENV"/.installed-*)
  [[ -e "${stamps[0]}" ]] || die "$VENV holds Python $there, but PYTHON=$PYTHON is $wanted;" \
    "remove it and start again, or leave out PYTHON"
  say "$VENV holds Python $there, wanted $wanted: making it anew"
  rm -rf "$VENV"
}

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }

# The file of locked versions for a Python version: 3.11 → constraints/py311.txt.
constraints_of() { printf '%s/constraints/py%s.txt' "$ROOT" "${1//./}"; }

# The torch that the parity tests compare with; none where they skip.
torch_for_tests() {
  if [[ "$PYTHON_VERSION" == 3.11 && "${JAXALIGN_NO_TORCH:-0}" != 1 ]]; then echo torch==2.13.0; fi
}

# What an installation depends on: this folder (it is an editable one), what pyproject.toml asks
# for, the interpreter, and the locked versions, or, without any, the day.
fingerprint() {
  "$VENV_PYTHON" - "$ROOT" "$CONSTRAINTS" "$NEWEST" <<'PYTHON'
import datetime, hashlib, pathlib, sys

root, constraints, newest = sys.argv[1:]
text = f"{root}\n{sys.version}\n".encode() + pathlib.Path(root, "pyproject.toml").read_bytes()
if constraints:
    text += pathlib.Path(constraints).read_bytes()
if newest == "1":
    text += str(datetime.date.today()).encode()
print(hashlib.sha256(text).hexdigest())
PYTHON
}

# Whether NAME was installed and nothing that it depends on has changed since.
is_installed() {
  local stamp="$VENV/.installed-$1"
  [[ -f "$stamp" && "$(<"$stamp")" == "$(fingerprint)" ]]
}

install() {
  ! is_installed "$1" || return 0
  local options=()
  [[ "$NEWEST" == 0 ]] || options=(--upgrade --upgrade-strategy eager)
  say "installing $2 (minutes, the first time)"
  pip_install ${options[@]+"${options[@]}"} -e "$2" || die "the installation failed; see pip's message above"
  fingerprint >"$VENV/.installed-$1"
}

# pip install, of the locked versions where there are any.
pip_install() {
  local locked=()
  [[ -z "$CONSTRAINTS" ]] || locked=(-c "$CONSTRAINTS")
  "$VENV_PYTHON" -m pip install -q --disable-pip-version-check ${locked[@]+"${locked[@]}"} "$@"
}
