"""One battery for all four steps: however the work is laid out, the result is the same."""

import functools

import chex
import jax
import numpy as np
import pytest
from cases import CASES, LENGTH, ROWS

from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state
from jaxalign.parallel.jax_private import count_compiled
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.run.checkpoint import Checkpoints

MESHES = {
    "rows4": ({"data": 4, "fsdp": 1, "sequence": 2}, 1),
    "fsdp8": ({"data": 1, "fsdp": 8, "tensor": 1}, 1),
    # Four row shards, so that two micro-batches of four rows each are spread over all of them.
    "2x2x2": ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
}


@pytest.fixture(scope="module", params=CASES, ids=repr)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def expected(case):
    """One device, one micro-batch, one padded example a row: (new parameters, metrics)."""
    state, metrics = case.jitted()(case.state(), case.padded())
    return jax.device_get((state.params, metrics))


@functools.cache
def on_mesh(case, name):
    """(compiled step, function that makes a fresh state on its mesh)."""
    sizes, micro_batches = MESHES[name]
    mesh = make_mesh(**sizes)
    shardings = param_shardings(case.axes, mesh, case.shapes)
    state = case.state(shardings)
    step = case.step(case.tx, micro_batches=micro_batches)
    return compile_step(step, state, mesh), lambda: case.state(shardings)


def same(expected, got, rtol=1e-5):
    """Metrics to `rtol` relative; parameters after the step to the same, in units of the step."""
    (params, metrics), (state, got_metrics) = expected, got
    assert set(metrics) == set(got_metrics)
    for name, value in metrics.items():
        np.testing.assert_allclose(got_metrics[name], value, rtol, 1e-6, err_msg=name)
    for path, want in jax.tree_util.tree_leaves_with_path(params):
        have = functools.reduce(lambda tree, key: tree[key.key], path, state.params)
        # One step moves a parameter by up to 1e-2 (the learning rate), and rounding of a gradient
        # by 1e-7 a small one by 10 times as much (learning rate / eps). So a lone entry may be 2e-6
        # off, 2e-4 of the step, but not the whole array: its root mean square is held tighter.
        np.testing.assert_allclose(have, want, 1e-6, 2e-6, err_msg=str(path))
        assert np.sqrt(np.mean(np.square(np.asarray(have) - want))) < 3e-7, path


def test_expected_step_moves_and_weighs(case, expected):
    params, metrics = expected
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 1e-2
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, params, case.params)
    assert all(jax.tree.leaves(moved)), moved


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_agree(case, expected, micro_batches):
    same(expected, case.jitted(micro_batches)(case.state(), case.padded()))


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_agree_with_one(case, expected, name):
    step, fresh = on_mesh(case, name)
    state = fresh()
    shards = {len(x.sharding.device_set) for x in jax.tree.leaves(state)}
    assert shards == {8}
    same(expected, step(state, case.padded()))


def test_parameters_and_moments_keep_their_layout(case):
    step, fresh = on_mesh(case, "2x2x2")
    before = jax.tree.map(lambda x: x.sharding, fresh())
    after, _ = step(fresh(), case.padded())
    assert jax.tree.map(lambda x: x.sharding, after) == before
    kernels = [x for x in jax.tree.leaves(after.opt_state) if x.ndim == 3]
    assert kernels
    assert all(not x.sharding.is_fully_replicated for x in kernels)


def wide(case, groups, *, left=False):
    """The same examples in another shape (one for all, to compile once): 16 rows of 26."""
    examples = case.documents(np.random.default_rng(0))
    return case.batch(examples, groups + [[]] * (16 - len(groups)), 26, left=left)


# Every document at another place, rows short and full, an empty row in between.
PACKED = [[6, 0, 2], [4], [], [1, 5], [3, 7]]


def test_packed_rows_agree_with_padded(case, expected):
    same(expected, case.jitted()(case.state(), wide(case, PACKED)))


def test_more_padding_on_the_left_and_empty_rows_change_nothing(case, expected):
    batch = wide(case, [[i] for i in range(ROWS)], left=True)
    same(expected, case.jitted()(case.state(), batch))


@pytest.mark.parametrize("packed", [False, True])
def test_garbage_in_empty_slots_changes_nothing(case, expected, packed):
    batch = wide(case, PACKED if packed else [[i] for i in range(ROWS)], left=not packed)
    spoiled = case.spoil(batch, np.random.default_rng(9))
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), batch, spoiled)
    assert any(jax.tree.leaves(changed))
    same(expected, case.jitted()(case.state(), spoiled))


def test_batch_of_empty_rows_moves_nothing_but_decay(case):
    batch = case.batch(case.documents(np.random.default_rng(0)), [[]] * ROWS, LENGTH)
    _, metrics = case.jitted()(case.state(), batch)
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(value) for value in metrics.values())


def test_one_compile_in_twenty_steps(case):
    step, fresh = on_mesh(case, "fsdp8")
    state = fresh()
    losses = []
    for seed in range(20):
        state, metrics = step(state, case.padded(seed))
        losses.append(float(metrics["loss"]))
    assert step.compiles == 1
    assert int(state.step) == 20
    assert len(set(losses)) == 20
    assert np.isfinite(losses).all()


def test_one_cache_entry_under_plain_jit(case, expected):
    step = case.jitted()
    before = count_compiled(step)
    state = case.state()
    for seed in range(3):
        state, _ = step(state, case.padded(seed))
    assert count_compiled(step) == before


def test_donation_spares_what_the_user_holds(case):
    step, fresh = on_mesh(case, "fsdp8")
    mine = fresh().params
    state = init_state(mine, case.tx)
    held = state.params
    state, first = step(state, case.padded())
    assert all(x.is_deleted() for x in jax.tree.leaves(held))
    state, second = step(state, case.padded())
    np.testing.assert_array_equal(jax.tree.leaves(mine)[0], jax.tree.leaves(case.params)[0])
    assert first["loss"] != second["loss"]


def test_resume_is_continue_bit_for_bit(case, tmp_path):
    step, fresh = on_mesh(case, "fsdp8")

    def run(state, seeds):
        logged = []
        for seed in seeds:
            state, metrics = step(state, case.padded(seed))
            logged.append(jax.device_get(metrics))
        return state, logged

    state, _ = run(fresh(), range(2))
    checkpoints = Checkpoints(tmp_path / "run")
    checkpoints.save(2, state, {"position": 2})
    straight, want = run(state, range(2, 4))
    checkpoints.close()

    checkpoints = Checkpoints(tmp_path / "run")
    resumed, loop = checkpoints.restore(fresh())
    checkpoints.close()
    assert loop == {"position": 2}
    resumed, got = run(resumed, range(2, 4))
    assert step.compiles == 1
    chex.assert_trees_all_equal(want, got)
    chex.assert_trees_all_equal(jax.device_get(straight), jax.device_get(resumed))


def test_rows_that_do_not_divide_are_refused(case):
    step, fresh = on_mesh(case, "fsdp8")
    with pytest.raises(ValueError, match=r"9 rows.*multiple of 8"):
        step(fresh(), case.padded(rows=9))
    with pytest.raises(ValueError, match=r"8 rows do not divide into micro_batches=3"):
        jax.eval_shape(case.step(case.tx, micro_batches=3), case.state(), case.padded())
    with pytest.raises(ValueError, match="micro_batches=0"):
        case.step(case.tx, micro_batches=0)
    state = case.state(param_shardings(case.axes, make_mesh(), case.shapes))
    split = compile_step(case.step(case.tx, micro_batches=2), state, make_mesh())
    with pytest.raises(ValueError, match=r"micro_batches=2.*8"):
        split(state, case.padded())
