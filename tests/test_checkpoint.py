"""Checkpoints: what is saved comes back, on the layout that is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms.state import init_state
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.run.checkpoint import Checkpoints


def make_state(mesh=None, seed=0, tx=None):
    params = tiny.random_params(tiny.DECODER, seed)
    if mesh is not None:
        params = jax.device_put(params, param_shardings(tiny.DECODER.axes, mesh))
    state = init_state(params, optax.adam(1e-3) if tx is None else tx)
    moments = jax.tree.map(lambda x: x + 1 if x.ndim else x, state.opt_state)
    return state._replace(opt_state=moments, step=state.step + 7)


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_comes_back_on_another_mesh_with_the_loops_position(tmp_path):
    saved = make_state(make_mesh(fsdp=8))
    loop = {"data": {"epoch": 1, "order": [3, 1, 2]}, "kl_coef": 0.1, "seed": 0}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(7, saved, loop)
    checkpoints.close()

    wanted = make_state(make_mesh(data=2, fsdp=2, tensor=2), seed=1)
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 7
    got, position = checkpoints.restore(wanted)
    checkpoints.close()
    equal(got, saved)
    assert position == loop
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, got, wanted)
    assert all(jax.tree.leaves(same))
    assert int(got.step) == 7


def test_arrays_are_copied_before_save_returns(tmp_path):
    state = make_state()
    want = jax.device_get(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, {})
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # as the next, donating step does
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    got, _ = checkpoints.restore(make_state(seed=1))
    checkpoints.close()
    equal(got, want)


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(seed=step), {"at": step})
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest == 3
    got, loop = checkpoints.restore(make_state(), step=2)
    checkpoints.close()
    assert loop == {"at": 2}
    equal(got.params, make_state(seed=2).params)


def test_frozen_parameters_are_not_saved_but_kept(tmp_path):
    base = tiny.random_params(tiny.DECODER)
    adapters = {"blocks": {"lora_a": jnp.ones((2, 3))}}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, init_state(adapters, optax.sgd(1.0), base), {})
    checkpoints.close()
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size < 30_000  # the base alone has 60 kB
    checkpoints = Checkpoints(tmp_path)
    blank = init_state(jax.tree.map(jnp.zeros_like, adapters), optax.sgd(1.0), base)
    got, _ = checkpoints.restore(blank)
    checkpoints.close()
    assert got.frozen is base
    equal(got.params, adapters)


def test_nothing_to_restore_is_said(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest is None
    with pytest.raises(ValueError, match=r"no checkpoint in .*resume"):
        checkpoints.restore(make_state())
    checkpoints.close()


@pytest.mark.parametrize("change", ["shape", "optimizer"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {})
    checkpoints.close()
    if change == "optimizer":
        other = make_state(tx=optax.sgd(1e-3, momentum=0.9))
    else:
        params = tiny.random_params(tiny.DECODER)
        params["norm"]["scale"] = jnp.ones(48)
        other = init_state(params, optax.adam(1e-3))
    checkpoints = Checkpoints(tmp_path)
    different = {"shape": r"opt_state/0/mu/norm/scale is \(32,\) .*\(48,\)", "optimizer": "missing"}
    with pytest.raises(ValueError, match=rf"/1 does not fit this run.*{different[change]}"):
        checkpoints.restore(other)
    checkpoints.close()
