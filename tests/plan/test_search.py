"""The search's estimates, without a compiler."""

import jax
import pytest

from jaxalign.parallel.chips import CHIPS
from jaxalign.plan import search_plans
from jaxalign.plan.search import candidates
from jaxalign.run.config.runs import load_config


def config(*overrides):
    values = {
        "model": {"source": "meta-llama/Llama-3.2-1B", "compute_dtype": "bfloat16"},
        "data": {"train": ["absent.jsonl"], "rows": 64, "length": 2048},
        "run": {"folder": "absent"},
    }
    return load_config("sft", values, overrides)


def test_settings_that_may_fit_fastest_first():
    chip = CHIPS["v5e"]
    found = candidates("sft", config(), jax.devices()[:8], chip)
    seconds = [one.seconds for one in found]
    assert seconds == sorted(seconds)
    assert all(one.memory < 1.1 * chip.memory for one in found)
    # 14.8 GB of parameters and float32 moments do not fit beside gradients without being cut.
    uncut = [
        one.config for one in found if (one.config.mesh.fsdp, one.config.mesh.tensor) == (1, 1)
    ]
    assert {one.optimizer.moments for one in uncut} <= {"int8"}
    # 16,384 tokens a device: what all layers keep is 37 GB without remat.
    whole = [one for one in found if one.config.run.micro_batches == 1]
    assert "none" not in {one.config.model.remat for one in whole}
    best = found[0]
    # The planner's prediction against the arithmetic alone: no clock is read.
    assert 0.3 < 64 * 2048 * 6 * 1.24e9 / 8 / chip.flops / best.seconds < 1.1
    again = config(*best.overrides)
    assert (again.mesh, again.run, again.model) == (
        best.config.mesh,
        best.config.run,
        best.config.model,
    )


def test_devices_of_unknown_speed():
    with pytest.raises(ValueError, match="speed of these devices is not known"):
        search_plans("sft", config(), "cpu:8")
