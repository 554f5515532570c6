"""Train steps compiled for TPUs and GPUs that are not there hold the kernels made for them."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parent.parent / "scripts/compile_ahead.py"


def lines(*given):
    """What the script says, in a process of its own: libtpu ends one at the tests' XLA_FLAGS."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
    command = [sys.executable, str(SCRIPT), *given]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1500)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(name) is None, reason=f"{name} is not installed"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("devices", "memory", "kernel"),
    [
        pytest.param("v5e:4x4", 16, "splash_mha", marks=installed("libtpu")),
        pytest.param("h100:8", 80, "__cudnn$fmhaSoftmax", marks=installed("jax_cuda12_plugin")),
    ],
)
def test_steps_of_a_1b_llama(devices, memory, kernel):
    found = lines("--devices", devices, "--algorithms", "sft", "dpo", "ppo")
    assert [one["algorithm"] for one in found] == ["sft", "dpo", "ppo"]
    for one in found:
        assert any(name.startswith(kernel) for name in one["kernels"]), one
        assert one["total_gib"] < memory, one
    (long,) = lines("--devices", devices, "--algorithms", "sft", "--mesh", "sequence=4")
    assert any(name.startswith(kernel.replace("fmhaSoftmax", "fmha")) for name in long["kernels"])
    assert long["mesh"]["sequence"] == 4
