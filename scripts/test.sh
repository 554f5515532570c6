#!/usr/bin/env bash
# Lints, checks types and runs the tests, from a fresh clone:
#
#   bash scripts/test.sh [--newest] [pytest options]
#
# Installs the versions in constraints/ into .venv. --newest takes what resolves today instead, in
# .venv-newest, which is brought up to date once a day.
# Needs Python ≥ 3.11 with its venv module; PYTHON names another interpreter than python3.
# JAXALIGN_TEST_WORKERS=4 runs four files of tests at a time instead of two.
# On Python 3.11 the parity tests get torch; JAXALIGN_NO_TORCH=1 leaves it out, and they skip.

set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

if [[ "${1:-}" == --newest ]]; then
  use_newest
  shift
fi
make_venv
# Before the rest, so that nothing else picks a torch of its own.
torch="$(torch_for_tests)"
if [[ -n "$torch" ]] &&
  ! "$VENV_PYTHON" -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))'; then
  say "installing $torch for the parity tests"
  pip_install "$torch" || say "torch could not be installed: its parity tests will skip"
fi
install test "${ROOT}[test]"

cd "$ROOT"
failed=0
check() {
  say "$*"
  "$VENV/bin/$1" "${@:2}" || failed=1
}
check ruff check .
check ruff format --check .
check pyrefly check --python-interpreter-path "$VENV_PYTHON"

# Last, and whatever the checks said: the summary of pytest is the last line. A failed check shows
# above and in the exit status.
# Two workers, a file of tests each: most of the time goes into compiling small programs on one core.
say "pytest $*"
"$VENV_PYTHON" -m pytest -n "${JAXALIGN_TEST_WORKERS:-2}" --dist loadfile "$@" || exit $?
exit "$failed"
