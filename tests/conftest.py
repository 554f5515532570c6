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
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of reference vectors and real data beside the checkout, where there is one."""
    folder = pathlib.Path(os.environ.get("JAXALIGN_SHARED", _ROOT.parent / "shared"))
    if not (folder / "oracle").is_dir():
        pytest.skip(f"no reference data at {folder} (set JAXALIGN_SHARED to the folder)")
    return folder
