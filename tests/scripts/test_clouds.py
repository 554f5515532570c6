"""Dockerfiles and SkyPilot's YAML: what they name is there, and the run gets what JAX needs."""

import pathlib
import re
import subprocess
import tomllib

import pytest
import yaml

from jaxalign.commands.startup.program_cache import FOLDER
from jaxalign.parallel.distributed.initialize import ADDRESS, COUNT, INDEX

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def instructions(path):
    """Instruction and what follows, lines joined, comments left out."""
    text = re.sub(r"(?m)^\s*#.*\n?", "", path.read_text(encoding="utf-8"))
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def of(path, name):
    return [rest for what, rest in instructions(path) if what == name]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_a_dockerfile_names_what_is_there(path):
    copied = [source for rest in of(path, "COPY") for source in rest.split()[:-1]]
    for source in copied:
        assert (ROOT / source).exists(), source
    # What the package's metadata names is needed to install it.
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "jaxalign"} <= {*copied}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not {*copied} & {*ignored}
    # The versions that are locked for the image's Python.
    (base,) = of(path, "FROM")
    version = re.match(r"python:(\d+)\.(\d+)-slim$", base)
    (pip,) = (rest for rest in of(path, "RUN") if rest.startswith("pip install"))
    assert f"-c constraints/py{version[1]}{version[2]}.txt " in pip
    assert f"constraints/py{version[1]}{version[2]}.txt" in copied


def test_dockerfiles_install_extras_of_the_project():
    assert [path.name for path in DOCKERFILES] == ["gpu.Dockerfile", "tpu.Dockerfile"]
    asked = [
        re.search(r'"\.\[(.*)\]"', rest)[1]
        for path in DOCKERFILES
        for rest in of(path, "RUN")
        if "pip install" in rest
    ]
    assert asked == ["cuda${CUDA}", "tpu"]
    assert of(DOCKERFILES[0], "ARG") == ["CUDA=12"]
    assert {"cuda12", "cuda13", "tpu"} <= {*EXTRAS}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_an_image_runs_without_root_and_keeps_its_caches_in_a_volume(path):
    names = [what for what, _ in instructions(path)]
    (user,) = of(path, "USER")
    assert user != "root"
    assert "RUN" not in names[names.index("USER") :]  # what is installed, root installed
    (volume,) = of(path, "VOLUME")
    variables = dict(pair.split("=") for rest in of(path, "ENV") for pair in rest.split())
    for name in ("HF_HOME", FOLDER):
        assert variables.pop(name).startswith(f"{volume}/")
    assert {*variables} <= {"XLA_PYTHON_CLIENT_MEM_FRACTION"}
    made = next(rest for rest in of(path, "RUN") if "useradd" in rest)
    assert f"chown -R {user} {volume}" in made


# SkyPilot

SKY = yaml.safe_load((ROOT / "scripts/launch/sky.yaml").read_text(encoding="utf-8"))
JOB = {"SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8", "SKYPILOT_NUM_NODES": "2"}


def run_of_sky(folder, **variables):
    """What the run gets: variables of JAX, and words."""
    python = folder / ".venv/bin/python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(
        '#!/bin/sh\nenv | grep -E "^(JAX|XLA|HF)_"\nprintf "%s\\n" -- "$@"\n', "utf-8"
    )
    python.chmod(0o755)
    given = {
        name: value for name, value in (SKY["envs"] | SKY["secrets"]).items() if value is not None
    }
    done = subprocess.run(
        ["bash", "-c", SKY["run"]],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"} | given | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    head, _, words = done.stdout.partition("--\n")
    return dict(line.split("=", 1) for line in head.splitlines()), words.splitlines()


def test_sky_tells_each_node_what_jax_wants_to_know(tmp_path):
    found, words = run_of_sky(tmp_path, **JOB, SKYPILOT_NODE_RANK="1", HF_TOKEN="hf_x")
    assert (found[ADDRESS], found[COUNT], found[INDEX]) == ("10.0.0.7:8476", "2", "1")
    assert (found["HF_HOME"], found["HF_TOKEN"]) == ("/shared/hf", "hf_x")
    assert words == ["-u", "-m", "jaxalign", *SKY["envs"]["COMMAND"].split(), "run.resume=auto"]


def test_sky_on_one_node_and_on_a_slice(tmp_path):
    one, _ = run_of_sky(
        tmp_path, SKYPILOT_NODE_IPS="10.0.0.7", SKYPILOT_NUM_NODES="1", SKYPILOT_NODE_RANK="0"
    )
    assert (one[COUNT], ADDRESS in one, INDEX in one) == ("1", False, False)
    assert "HF_TOKEN" not in one  # an empty token would be refused by the hub
    # With JAX_NUM_PROCESSES set, the metadata of the slice would not be read.
    slice_, _ = run_of_sky(tmp_path, **JOB, SKYPILOT_NODE_RANK="1", EXTRA="tpu")
    assert not {ADDRESS, COUNT, INDEX} & {*slice_}


def test_sky_installs_locked_versions_and_mounts_what_the_run_writes():
    (python,) = re.findall(r"--python 3\.(\d+)", SKY["setup"])
    (locked,) = re.findall(r"-c (\S+)", SKY["setup"])
    assert locked == f"constraints/py3{python}.txt"
    assert (ROOT / locked).exists()
    assert SKY["envs"]["EXTRA"] in EXTRAS
    (mount,) = SKY["file_mounts"]
    words = SKY["envs"]["COMMAND"].split()
    assert (ROOT / words[1]).exists()
    assert words[2].startswith(f"run.folder={mount}/")
    assert SKY["envs"]["HF_HOME"].startswith(f"{mount}/")
    assert SKY["envs"]["BUCKET"] is None  # SkyPilot asks for what is null
    subprocess.run(["bash", "-n", "-c", SKY["setup"]], check=True)
