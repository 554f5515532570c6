"""`jaxalign doctor`: what it reports, and that each problem is found and says what to do."""

import importlib.metadata
import json
import pathlib
import types

import jax
import pytest

from jaxalign.commands import cli
from jaxalign.commands.doctor import checks, facts
from jaxalign.plan import installed

GIB = 2**30


def device(kind="NVIDIA H100 80GB HBM3", platform="gpu", process=0, memory=None):
    stats = None if memory is None else {"bytes_limit": memory}
    return types.SimpleNamespace(
        device_kind=kind, platform=platform, process_index=process, memory_stats=lambda: stats
    )


@pytest.fixture
def packages(monkeypatch):
    """Sets what is installed, and what each package asks for."""

    def install(versions, requires):
        def version(package):
            if package not in versions:
                raise importlib.metadata.PackageNotFoundError(package)
            return versions[package]

        def asks(package):
            if package not in requires:
                raise importlib.metadata.PackageNotFoundError(package)
            return requires[package]

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", asks)
        monkeypatch.setattr(jax, "__version__", "0.10.2")

    return install


REQUIRES = {
    "jaxalign": ["numpy>=2.0", 'jax[tpu]>=0.10.2; extra == "tpu"'],
    "jax": [
        "jaxlib<=0.10.2,>=0.10.2",
        'colorama>=1; sys_platform == "win32"',
        'libtpu==0.0.42.*; extra == "tpu"',
        'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
        'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
    ],
    "jax-cuda12-plugin": ['nvidia-cudnn-cu12<10.0,>=9.8; extra == "with-cuda"'],
    "jax-cuda13-plugin": [],
}
FITS = {"numpy": "2.4.6", "jaxlib": "0.10.2", "jax": "0.10.2", "jaxalign": "0.1.0"}


def test_versions_that_fit(packages):
    packages(FITS | {"libtpu": "0.0.42.1"}, REQUIRES)
    assert checks.check_packages() == []


@pytest.mark.parametrize(
    ("versions", "what", "remedy"),
    [
        (
            {"numpy": "1.26.4"},
            "numpy 1.26.4 is installed, jaxalign wants numpy >=2.0",
            'pip install "numpy>=2.0"',
        ),
        (
            {"jaxlib": "0.11.0"},
            "jaxlib 0.11.0 is installed, jax wants jaxlib <=0.10.2,>=0.10.2",
            'pip install "jaxlib<=0.10.2,>=0.10.2"',
        ),
        (
            {"libtpu": "0.0.52"},
            "libtpu 0.0.52 is installed, JAX 0.10.2 wants libtpu ==0.0.42.*",
            'pip install "libtpu==0.0.42.*"',
        ),
        (
            {"jax-cuda12-plugin": "0.10.2", "nvidia-cudnn-cu12": "9.1.0"},
            "nvidia-cudnn-cu12 9.1.0 is installed, jax-cuda12-plugin 0.10.2 wants "
            "nvidia-cudnn-cu12 <10.0,>=9.8",
            'pip install "nvidia-cudnn-cu12<10.0,>=9.8"',
        ),
        (
            {"jax-cuda12-plugin": "0.10.2", "jax-cuda13-plugin": "0.10.2"},
            "jax-cuda12-plugin and jax-cuda13-plugin are both installed",
            "keep one: pip uninstall jax-cuda12-plugin jax-cuda12-pjrt",
        ),
    ],
)
def test_versions_that_do_not(packages, versions, what, remedy):
    packages(FITS | versions, REQUIRES)
    assert checks.check_packages() == [(what, remedy)]


def test_a_package_that_is_missing(packages):
    packages({name: v for name, v in FITS.items() if name != "numpy"}, REQUIRES)
    (problem,) = checks.check_packages()
    assert problem.what == "numpy is not installed, jaxalign wants numpy >=2.0"


def test_an_accelerator_that_jax_overlooks(packages, monkeypatch):
    files = {"/dev/nvidia0"}
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: str(path) in files)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    processor = [device("cpu", "cpu")]
    packages(FITS, REQUIRES)
    (problem,) = installed.overlooked(processor)
    assert problem.remedy == 'pip install "jaxalign[cuda12]"'
    packages(FITS | {"jax-cuda13-plugin": "0.10.2"}, REQUIRES)
    (problem,) = installed.overlooked(processor)
    assert "jax-cuda13-plugin" in problem.what
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert installed.overlooked(processor)[0].remedy == "unset it"
    assert installed.overlooked([device()]) == []
    files.clear()
    assert installed.overlooked(processor) == []


def test_little_memory_and_disk():
    host = facts.Machine("Linux", 2, 2 * GIB, 1 * GIB, 50 * GIB)
    what = [problem.what for problem in checks.check_machine(host)]
    assert what == ["the host has 2.0 GiB of memory", "1.0 GiB of disk are free in this folder"]
    assert checks.check_machine(host._replace(memory=None, free_disk=9 * GIB)) == []


def test_settings_that_surprise(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")
    monkeypatch.setenv("JAX_DISABLE_JIT", "true")
    assert len(checks.check_variables()) == 2
    monkeypatch.delenv("JAX_ENABLE_X64")
    monkeypatch.setenv("JAX_DISABLE_JIT", "0")
    assert checks.check_variables() == []


def test_no_secret_is_shown(monkeypatch):
    monkeypatch.setenv("HF_HUB_TOKEN", "hf_secret")
    monkeypatch.setenv("JAXALIGN_JUDGE_KEY", "sk-secret")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    shown = facts.variables()
    assert shown["JAX_PLATFORMS"] == "cpu"
    assert "secret" not in str(shown)


def test_devices():
    eight = [device(process=i // 4, memory=80 * GIB) for i in range(8)]
    assert facts.describe_devices(eight) == ("8 × NVIDIA H100 80GB HBM3 of 80.0 GiB on 2 hosts")
    mixed = [device(), device("NVIDIA A100-SXM4-40GB")]
    assert "several kinds" in checks.check_devices(mixed)[0].what


@pytest.mark.parametrize(
    ("count", "hosts"), [(1, 1), (2, 1), (3, 1), (4, 1), (8, 1), (16, 2), (64, 16)]
)
def test_suggested_meshes_use_every_device(count, hosts):
    rows = facts.meshes(count, hosts)
    for mesh, why in rows:
        sizes = [int(word.partition("=")[2]) for word in mesh.split()]
        product = 1
        for size in sizes:
            product *= size
        assert product == count, mesh
        assert why
    assert any("mesh.data=" in mesh for mesh, _ in rows) == (hosts > 1)


def test_largest_models():
    """Four devices of 80 GB: half of 320 GB at 40 bytes a parameter is 4 billion."""
    assert dict(facts.largest_models(80 * 10**9, 4))["PPO with its four models"] == pytest.approx(4)


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(checks, "check_packages", list)
    monkeypatch.setattr(checks, "check_machine", lambda host: [])
    monkeypatch.setattr(checks, "check_variables", list)
    monkeypatch.setattr(checks, "check_devices", lambda devices: [])
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"jax {jax.__version__}" in text
    assert "devices   8 × cpu" in text
    assert "mesh.fsdp=8" in text
    assert "no problems found" in text
    wrong = installed.Problem("libtpu 1 is installed", "pip install libtpu==2")
    monkeypatch.setattr(checks, "check_packages", lambda: [wrong])
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "problem   libtpu 1 is installed\n          → pip install libtpu==2" in text
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["devices"]) == 8
    assert found["problems"] == [{"what": wrong.what, "remedy": wrong.remedy}]


def test_no_device_is_a_problem_not_a_crash(capsys, monkeypatch):
    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu': it is in use\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    assert cli.main(["doctor"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "JAX finds no device: Unable to initialize backend 'tpu': it is in use" in text
