"""Adapters: start equal, merge equal, train alone."""

import jax
import numpy as np
import pytest
import tiny

from jaxalign.algorithms import sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, add_lora, merge_lora
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings

CONFIG = LoraConfig(rank=3, alpha=6.0, targets=("query", "value", "down"))


@pytest.fixture(scope="module")
def base():
    return tiny.random_params(Decoder(tiny.BIASED))


@pytest.fixture(scope="module")
def adapted(base):
    return add_lora(Decoder(tiny.BIASED), base, jax.random.key(0), CONFIG)


def batch():
    rng = np.random.default_rng(0)
    documents = [tiny.document(rng, length) for length in (4, 9, 7, 3, 8, 5, 6, 9)]
    return tiny.token_batch(tiny.lay(documents, tiny.alone(8), 9))


def test_only_the_named_projections_get_adapters(adapted, base):
    model, adapters, frozen = adapted
    assert frozen is base
    shapes = jax.tree.map(lambda x: x.shape, adapters)
    assert shapes == {
        "blocks": {
            "attention": {
                "query": {"lora_a": (2, 32, 3), "lora_b": (2, 3, 32)},
                "value": {"lora_a": (2, 32, 3), "lora_b": (2, 3, 16)},
            },
            "mlp": {"down": {"lora_a": (2, 48, 3), "lora_b": (2, 3, 32)}},
        }
    }
    assert model.axes["blocks"]["mlp"]["down"]["lora_a"] == "layers mlp rank"
    # Order one after the projection: N(0, 1/fan_in).
    drawn = np.asarray(adapters["blocks"]["mlp"]["down"]["lora_a"]) * np.sqrt(48)
    # Four standard errors of a standard deviation, σ/√(2n).
    assert abs(drawn.std() - 1) < 4 / np.sqrt(2 * drawn.size)


def test_starts_equal_to_the_base(adapted, base):
    model, adapters, frozen = adapted
    rows = batch()
    plain = jax.jit(Decoder(tiny.BIASED).apply)(base, rows.inputs)
    got = jax.jit(model.apply)(combine(adapters, frozen), rows.inputs)
    np.testing.assert_array_equal(got, plain)


def test_training_moves_adapters_alone_and_merges_equal(adapted, base):
    model, adapters, frozen = adapted
    before = jax.device_get(base)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-1, schedule="constant"))
    state = init_state(adapters, tx, frozen)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state))
    assert moments < 3 * sum(x.size for x in jax.tree.leaves(adapters))
    step = jax.jit(sft.make_step(model, tx))
    losses = []
    for _ in range(5):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.05
    jax.tree.map(np.testing.assert_array_equal, state.frozen, before)
    for leaf in jax.tree.leaves(state.params):
        assert np.abs(leaf).max() > 0

    together = combine(state.params, state.frozen)
    plain, merged = merge_lora(model, together)
    assert plain == Decoder(tiny.BIASED)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    want = jax.jit(model.apply)(together, batch().inputs)
    got = jax.jit(plain.apply)(merged, batch().inputs)
    np.testing.assert_allclose(got, want, 1e-4, 1e-4)
    # α/r · A·B = 2 · A·B, by hand for one layer.
    down, old = state.params["blocks"]["mlp"]["down"], before["blocks"]["mlp"]["down"]
    update = 2.0 * np.asarray(down["lora_a"][1]) @ np.asarray(down["lora_b"][1])
    assert np.abs(update).max() > 1e-2
    np.testing.assert_allclose(
        merged["blocks"]["mlp"]["down"]["kernel"][1], old["kernel"][1] + update, 1e-5, 1e-5
    )


def test_the_base_survives_a_donating_step_on_a_mesh(base):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    plain = Decoder(tiny.BIASED)
    placed = jax.device_put(base, param_shardings(plain.axes, mesh, plain.shapes))
    model, adapters, frozen = add_lora(plain, placed, jax.random.key(0), CONFIG)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(adapters))
    tx = make_optimizer()
    state = init_state(adapters, tx, frozen)
    held = state.params
    step = compile_step(sft.make_step(model, tx), state, mesh)
    state, first = step(state, batch())
    state, _ = step(state, batch())
    assert step.compiles == 1
    # The base is still there, as the reference of a DPO run needs it.
    jax.tree.map(np.testing.assert_array_equal, placed, base)
    assert all(x.is_deleted() for x in jax.tree.leaves(held))
    single = add_lora(plain, base, jax.random.key(0), CONFIG)
    _, want = jax.jit(sft.make_step(model, tx))(init_state(single[1], tx, base), batch())
    np.testing.assert_allclose(first["loss"], want["loss"], 1e-5)
    np.testing.assert_allclose(first["grad_norm"], want["grad_norm"], 1e-5)


def test_misuse_is_refused(adapted, base):
    model, adapters, frozen = adapted
    with pytest.raises(ValueError, match="already has adapters"):
        add_lora(model, combine(adapters, frozen), jax.random.key(0))
    with pytest.raises(ValueError, match="no adapters to merge"):
        merge_lora(Decoder(tiny.BIASED), base)
    with pytest.raises(ValueError, match="lora rank=0"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match=r"lora targets=\('qkv',\)"):
        LoraConfig(targets=("qkv",))
