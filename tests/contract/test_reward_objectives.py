"""Rankings, grades and steps: however the work is laid out, the result is the same; all learn."""

import jax
import numpy as np
import pytest
from cases import LENGTH, ROWS
from reward_cases import EMPTY, PACKS, REWARD_CASES
from test_contract import PACKED, on_mesh, same, wide


@pytest.fixture(scope="module", params=REWARD_CASES, ids=repr)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def expected(case):
    """One device, one micro-batch, one padded example a row: (new parameters, metrics)."""
    state, metrics = case.jitted()(case.state(), case.padded())
    return jax.device_get((state.params, metrics))


def test_expected_step_moves_every_parameter(case, expected):
    params, metrics = expected
    assert metrics["grad_norm"] > 1e-2
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, params, case.params)
    assert all(jax.tree.leaves(moved)), moved


def test_eight_devices_and_two_micro_batches_agree_with_one_and_compile_once(case, expected):
    step, fresh = on_mesh(case, "2x2x2")
    state, metrics = step(fresh(), case.padded())
    same(expected, (state, metrics))
    for seed in range(1, 4):
        state, metrics = step(state, case.padded(seed))
        assert np.isfinite(metrics["loss"])
    assert step.compiles == 1


def test_padding_packing_and_garbage_do_not_show(case, expected):
    """All in one shape: padded on the left, with empty rows, packed where it can be, spoilt."""
    jitted = case.jitted()
    alone = [[i] for i in range(ROWS)]
    left = wide(case, alone, left=True)
    same(expected, jitted(case.state(), left))
    if PACKS[case.name]:
        same(expected, jitted(case.state(), wide(case, PACKED)))
    spoilt = case.spoil(left, np.random.default_rng(9))
    same(expected, jitted(case.state(), spoilt))


def test_batch_of_empty_rows_moves_nothing_but_decay(case):
    batch = case.batch(case.documents(np.random.default_rng(0)), EMPTY, LENGTH)
    _, metrics = case.jitted()(case.state(), batch)
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


GOALS = {
    "ranking": {"accuracy": 1.0, "best": 1.0},
    "regression": {"loss": 0.05},
    "steps": {"accuracy": 1.0},
}


def test_each_objective_learns_a_batch_by_heart(case):
    state, batch = case.state(), case.padded()
    logged = []
    for _ in range(80):
        state, metrics = case.jitted()(state, batch)
        logged.append({name: float(value) for name, value in metrics.items()})
    first, last = logged[0], logged[-1]
    assert last["loss"] < 0.8 * first["loss"]
    for name, goal in GOALS[case.name].items():
        if name == "loss":
            assert last[name] < goal < first[name]
        else:
            assert last[name] == goal > first[name]
