"""Test-wide settings: 8 fake CPU devices, no network, rank promotion raises, shared inputs."""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    ).strip()
# Tests compile much and compute little: compiling plainly is 3 to 10 times faster, running at most
# twice slower. JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests the code that users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"  # gone from later versions
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAXALIGN_CACHE", "")  # no program of another day
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
    """Warnings about the code of tests and scripts are errors, as those about the package are."""
    ours = {path.stem for name in ("tests", "scripts") for path in (_ROOT / name).rglob("*.py")}
    config.addinivalue_line("filterwarnings", rf"error:::({'|'.join(sorted(ours))})$")


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference vectors and real data beside the checkout, where there is one."""
    folder = pathlib.Path(os.environ.get("JAXALIGN_SHARED", _ROOT.parent / "shared"))
    if not (folder / "oracle").is_dir():
        pytest.skip(f"no reference data at {folder} (set JAXALIGN_SHARED to the folder)")
    return folder


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory) -> pathlib.Path:
    """A folder with a tiny language model in `chat` and a tiny reward model in `scorer`."""
    import chatmodel

    return chatmodel.save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def _program_folder(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def kept_programs(_program_folder):
    """Whole runs compile the same programs again and again: keeps them on disk for the module."""
    from jax.experimental.compilation_cache import compilation_cache

    values = {
        "jax_compilation_cache_dir": str(_program_folder),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
