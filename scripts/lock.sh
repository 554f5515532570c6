#!/usr/bin/env bash
# Renews the locked versions of one Python version: PYTHON=python3.12 bash scripts/lock.sh
#
# Resolves what quickstart and the tests install as of today, in an empty environment that is thrown
# away, and writes names and versions to constraints/py312.txt. Nothing of .venv is touched or read.
# Needs Python ≥ 3.11 with its venv module; PYTHON names another interpreter than python3.

set -euo pipefail
# shellcheck source=scripts/_venv.sh
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

for argument in "$@"; do
  case "$argument" in
    PYTHON=*) PYTHON="${argument#PYTHON=}" ;;
    *) die "no such option: '$argument'; wanted PYTHON=/path/to/python, or nothing" ;;
  esac
done

find_python
PYTHON_VERSION="$(version_of "$PYTHON_COMMAND")"
CONSTRAINTS="$(constraints_of "$PYTHON_VERSION")"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT

wanted=("${ROOT}[test]")
torch="$(JAXALIGN_NO_TORCH=0 torch_for_tests)"
[[ -z "$torch" ]] || wanted+=("$torch")

say "resolving ${wanted[*]} with $("$PYTHON_COMMAND" --version) (minutes)"
"$PYTHON_COMMAND" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check \
  --dry-run --ignore-installed --report "$folder/report.json" "${wanted[@]}" ||
  die "pip found no versions that go together; see its message above"

mkdir -p "$(dirname "$CONSTRAINTS")"
"$folder/venv/bin/python" - "$folder/report.json" "$PYTHON_VERSION" >"$folder/constraints.txt" \
  <<'PYTHON'
import json, re, sys

report, version = sys.argv[1:]
print(f"# What quickstart and the tests install on Python {version}, made by scripts/lock.sh.")
lines = []
for item in json.load(open(report, encoding="utf-8"))["install"]:
    name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
    if name != "jaxalign":
        # Without the part after "+", which says how a wheel was built: another index has others.
        lines.append(f"{name}=={item['metadata']['version'].partition('+')[0]}")
print("\n".join(sorted(lines)))
PYTHON
mv "$folder/constraints.txt" "$CONSTRAINTS"
say "${CONSTRAINTS#"$ROOT/"}: $(grep -c == "$CONSTRAINTS") packages"
