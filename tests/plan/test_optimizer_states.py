"""The memory that a plan counts for each optimizer's state, by hand."""

import chatmodel
import jax
import pytest

from jaxalign.plan.make import run_shapes
from jaxalign.plan.programs import device_bytes
from jaxalign.run.config.runs import load_config

# Parameters of `chatmodel.DECODER` on one of 8 devices, as in test_plan: norms are whole.
TABLES = 2 * 260 * 32 // 8
KERNELS = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48) // 8
NORMS = 5 * 32
ALL = TABLES + KERNELS + NORMS

# Float32 numbers beside scalars. No matrix has 128 rows and columns, so that Adafactor's second
# moment is whole, with two placeholders for each of 7 × 2 matrices, 2 × 2 norms, and 3 others.
STATES = {
    "adamw": 2 * ALL,
    "adafactor": ALL + 2 * (7 * 2 + 2 * 2 + 2 * 1 + 1),
    "lion": ALL,
    "muon": KERNELS + 2 * (TABLES + NORMS) + 3,  # and Newton's three coefficients
    "schedule_free": 2 * ALL,
    "sgd": ALL,
}
COUNTERS = {"adamw": 2, "adafactor": 2, "lion": 2, "muon": 3, "schedule_free": 6, "sgd": 1}


@pytest.mark.parametrize("name", STATES)
def test_states_are_counted_and_cut(chat_models, tmp_path, name):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run")
    values["optimizer"] = {"name": name, "warmup_ratio": 0.1}
    config = load_config("sft", values)
    state, _ = run_shapes("sft", config, config.mesh.make())
    arrays = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert device_bytes(arrays) == 4 * STATES[name]
    assert len(jax.tree.leaves(state.opt_state)) - len(arrays) == COUNTERS[name]


def test_the_average_and_a_warm_up_by_ratio_without_steps(chat_models, tmp_path):
    values = chatmodel.settings("sft", chat_models, tmp_path / "run", steps=None)
    values["data"]["epochs"] = 1
    values["optimizer"] = {"ema": 0.99, "schedule": "cosine", "warmup_ratio": 0.9}
    values["sft"] = {"neftune_alpha": 5}
    config = load_config("sft", values)
    state, _ = run_shapes("sft", config, config.mesh.make())
    assert device_bytes([x for x in jax.tree.leaves(state.opt_state) if x.ndim]) == 4 * 3 * ALL
