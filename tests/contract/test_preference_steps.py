"""DPO with all its options, sorted over a batch, with shared prompts; KTO: layout is nothing."""

import jax
import numpy as np
import pytest
import tiny
from cases import LENGTH, ROWS
from preference_cases import EVERYTHING, MESHES, PACKS, PREFERENCE_CASES, pairs, shared_batch
from test_contract import PACKED, on_mesh, same, wide

from jaxalign.algorithms import dpo


@pytest.fixture(scope="module", params=PREFERENCE_CASES, ids=repr)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def expected(case):
    """One device, one micro-batch, one padded example a row: (new parameters, metrics)."""
    state, metrics = case.jitted()(case.state(), case.padded())
    return jax.device_get((state.params, metrics))


def test_expected_step_moves_every_parameter(case, expected):
    params, metrics = expected
    assert metrics["grad_norm"] > 1e-3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, params, case.params)
    assert all(jax.tree.leaves(moved)), moved


def test_eight_devices_and_micro_batches_agree_with_one_and_compile_once(case, expected):
    step, fresh = on_mesh(case, MESHES[case.name])
    state, metrics = step(fresh(), case.padded())
    same(expected, (state, metrics))
    for seed in range(1, 4):
        state, metrics = step(state, case.padded(seed))
        assert np.isfinite(metrics["loss"])
    assert step.compiles == 1


def test_padding_packing_and_garbage_do_not_show(case, expected):
    """Padded on the left, with empty rows, packed where it can be, spoilt."""
    jitted = case.jitted()
    left = wide(case, [[i] for i in range(ROWS)], left=True)
    same(expected, jitted(case.state(), left))
    spoilt = case.spoil(left, np.random.default_rng(9))
    same(expected, jitted(case.state(), spoilt))
    if PACKS[case.name]:
        packed = wide(case, PACKED)
        same(expected, jitted(case.state(), packed))
        same(expected, jitted(case.state(), case.spoil(packed, np.random.default_rng(9))))


def test_batch_of_empty_rows_moves_nothing_but_decay(case):
    batch = case.batch(case.documents(np.random.default_rng(0)), [[]] * ROWS, LENGTH)
    _, metrics = case.jitted()(case.state(), batch)
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


def test_shared_prompts_equal_pairs_side_by_side():
    """The whole step: loss, every metric, gradient norm, and the parameters after it."""
    everything, _, shared, _ = PREFERENCE_CASES
    state, metrics = everything.jitted()(everything.state(), everything.padded())
    want = jax.device_get((state.params, metrics))
    same(want, shared.jitted()(shared.state(), shared.padded()))
    same(want, shared.jitted()(shared.state(), wide(shared, PACKED)))


def test_a_shared_prompt_is_read_once_and_answers_do_not_see_each_other():
    examples = pairs(np.random.default_rng(0))
    batch = shared_batch(examples, [[i] for i in range(ROWS)], LENGTH)
    tokens = (batch.tokens.segment_ids > 0).sum(axis=1)
    sides = [len(x["chosen"]["inputs"]) + len(x["rejected"]["inputs"]) for x in examples]
    np.testing.assert_array_equal(tokens, np.array(sides) - [x["prompt"] - 1 for x in examples])
    shared = PREFERENCE_CASES[2]
    loss = jax.jit(dpo.make_loss(tiny.DECODER, EVERYTHING).terms)
    _, before = loss(shared.params, batch)
    branch = batch.tokens.branch_ids
    other = np.where(branch == 2, (batch.tokens.inputs + 7) % 64, batch.tokens.inputs)
    _, after = loss(shared.params, batch._replace(tokens=batch.tokens._replace(inputs=other)))
    assert after["logps/chosen"] == before["logps/chosen"]
    assert after["logps/rejected"].total != before["logps/rejected"].total
