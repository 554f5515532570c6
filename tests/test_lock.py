"""The locked versions: complete, nothing but names and versions, and used by the scripts."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOCKS = sorted((ROOT / "constraints").glob("*.txt"))


def locked(path):
    lines = path.read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_there_are_locks():
    assert {"py311.txt", "py312.txt"} <= {path.name for path in LOCKS}
    assert locked(ROOT / "constraints/py311.txt")["torch"] == "2.13.0"  # for the parity tests


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_they_hold_names_and_versions_alone(path):
    comment, *lines = path.read_text("utf-8").splitlines()
    assert comment.startswith("# What quickstart and the tests install on Python 3.")
    for line in lines:
        assert re.fullmatch(r"[a-z0-9-]+==[0-9][a-z0-9.]*", line), line
    assert lines == sorted(set(lines))


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_they_are_what_pyproject_asks_for(path):
    """Else: PYTHON=python3.11 bash scripts/lock.sh, and the same with 3.12."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = locked(path)
    for text in project["dependencies"] + project["optional-dependencies"]["test"]:
        wanted = Requirement(text)
        got = versions.get(canonicalize_name(wanted.name))
        assert got is not None, f"{path.name} lacks {wanted.name}: run scripts/lock.sh"
        assert wanted.specifier.contains(got), f"{path.name} has {wanted.name} {got}, not {wanted}"


# --- the scripts, with a pip that says what it was asked for -------------------------------------

PIP = """
import os, sys
if sys.argv[1:3] == ["-m", "pip"]:
    with open(os.environ["ASKED"], "a") as file:
        print(*sys.argv[3:], file=file)
elif sys.argv[1:2] == ["-m"]:
    print("ran", *sys.argv[2:])
elif sys.argv[1] == "-c":
    exec(sys.argv[2], {"sys": sys})
else:
    sys.argv = sys.argv[1:]
    exec(sys.stdin.read())
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with the scripts, whose Pythons install nothing."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "constraints").mkdir()
    (tmp_path / "play.py").write_text(PIP)
    for name in (".venv", ".venv-newest"):
        folder = tmp_path / name / "bin"
        folder.mkdir(parents=True)
        (folder / "python").write_text(
            f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/play.py" "$@"'
        )
        for tool in ("ruff", "pyrefly"):
            (folder / tool).write_text("#!/bin/sh\n")
        for file in folder.iterdir():
            file.chmod(0o755)
    return tmp_path


def run(checkout, *arguments, **environment):
    """Runs test.sh; gives what it said and what pip was asked for."""
    asked = checkout / "asked"
    asked.write_text("")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | environment
    done = subprocess.run(
        ["bash", str(checkout / "scripts/test.sh"), *arguments],
        env=environment | {"ASKED": str(asked), "JAXALIGN_NO_TORCH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, asked.read_text().splitlines()


VERSION = "{}.{}".format(*sys.version_info)
LOCK = f"constraints/py{VERSION.replace('.', '')}.txt"


def test_the_locked_versions_are_installed_once(checkout):
    (checkout / LOCK).write_text("jax==1.0\n")
    said, (asked,) = run(checkout, "tests/losses", "-x")
    assert f"-c {checkout / LOCK} -e {checkout}[test]" in asked
    assert said.splitlines()[-1].endswith("--dist loadfile tests/losses -x")
    assert run(checkout)[1] == []
    (checkout / LOCK).write_text("jax==1.1\n")  # renewed
    assert len(run(checkout)[1]) == 1
    assert run(checkout)[1] == []


def test_without_a_lock_it_is_said(checkout):
    said, (asked,) = run(checkout)
    assert f"no locked versions for Python {VERSION} ({LOCK}): taking what resolves" in said
    assert " -c " not in asked


def test_the_newest_go_into_a_folder_of_their_own(checkout):
    (checkout / LOCK).write_text("jax==1.0\n")
    said, (asked,) = run(checkout, "--newest", "tests/losses")
    assert " -c " not in asked
    assert "--upgrade --upgrade-strategy eager" in asked
    assert (checkout / ".venv-newest/.installed-test").exists()
    assert not (checkout / ".venv/.installed-test").exists()
    assert said.splitlines()[-1].endswith("--dist loadfile tests/losses")


def test_python_may_be_named(checkout):
    (checkout / LOCK).write_text("jax==1.0\n")
    assert len(run(checkout, PYTHON=sys.executable)[1]) == 1
    other = checkout / "other"
    other.write_text('#!/bin/sh\n[ "$#" = 2 ] && echo 3.99 || exit 7\n')
    other.chmod(0o755)
    with pytest.raises(AssertionError):
        run(checkout, PYTHON=str(other))  # is asked to make an environment, and cannot
    assert not (checkout / ".venv").exists()
    (checkout / ".venv-newest/made-by-hand").write_text("")
    with pytest.raises(AssertionError, match=r"holds Python .* remove it and start again"):
        run(checkout, "--newest", PYTHON=str(other))
    assert (checkout / ".venv-newest/made-by-hand").exists()
