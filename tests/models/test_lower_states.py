"""Layers below all adapters: run without them, never differentiated, replaced by their results.

The reference is the base with the adapters multiplied into its weights: an ordinary model.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.layer_loop import REMAT
from jaxalign.models.lora import LoraConfig, add_lora, merge_lora
from jaxalign.parallel.mesh import make_mesh
from jaxalign.types import LowerStates

UPPER = LoraConfig(rank=2, alpha=4.0, targets=(r"layers\.[23]\..*",))
SHALLOW = Decoder(dataclasses.replace(tiny.BIASED, num_layers=4))
# More layers than a CPU unrolls.
DEEP = Decoder(dataclasses.replace(tiny.BIASED, num_layers=10))


def adapted(model):
    """A model with adapters in its last layers, of which none is 0, and its rows' parameters."""
    last = dataclasses.replace(UPPER, targets=(rf"layers\.{model.config.num_layers - 2}\..*",))
    last = dataclasses.replace(last, targets=(*last.targets, r"layers\.3\.attention\.value"))
    model, adapters, frozen = add_lora(model, tiny.random_params(model), jax.random.key(0), last)
    rng = np.random.default_rng(5)

    def with_b(path, x):
        if path[-1].key == "lora_a":
            return x
        a = adapters["blocks"][path[1].key][path[2].key]["lora_a"]
        there = np.any(np.asarray(a) != 0, (1, 2), keepdims=True)
        return jnp.asarray(there * 0.3 * rng.normal(size=x.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(with_b, adapters), frozen


def rows():
    rng = np.random.default_rng(1)
    documents = [tiny.document(rng, length) for length in (6, 9, 4, 7)]
    return tiny.token_batch(tiny.lay(documents, [[0], [1, 2], [3]], 16))


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 2),
        ({"targets": (r"layers\.3\..*", r"layers\.1\.mlp\.up")}, 1),
        ({"targets": ("query",)}, 0),
        ({"targets": ("lm_head",)}, 3),
        ({"targets": ("embed", *UPPER.targets)}, 0),
        ({"modules_to_save": ("norm", "lm_head")}, 2),
        ({"modules_to_save": ("attention_norm",)}, 0),
        ({"dora": True}, 0),
    ],
)
def test_the_layers_that_training_leaves_alone(changes, count):
    model = dataclasses.replace(SHALLOW, lora=dataclasses.replace(UPPER, **changes))
    assert model.frozen_layers == count
    assert SHALLOW.frozen_layers == 0
    routed = dataclasses.replace(tiny.CONFIG, num_layers=4, num_experts=2, experts_per_token=1)
    assert dataclasses.replace(model, config=routed).frozen_layers == 0


@pytest.mark.parametrize("model", [SHALLOW, DEEP], ids=["unrolled", "in a loop"])
def test_hidden_states_are_those_of_the_merged_model(model):
    plain = model
    model, adapters, frozen = adapted(model)
    params, tokens = combine(adapters, frozen), rows()
    assert model.frozen_layers == (2 if model.config.num_layers == 4 else 3)
    args = (tokens.inputs, tokens.positions, tokens.segment_ids)
    want = plain.apply(merge_lora(model, params)[1], *args)
    got = jax.jit(model.apply)(params, *args)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    lower = jax.jit(model.lower_states)(params, *args)
    assert lower.hidden.shape == (3, 16, 32)
    # A model that has nothing but zeros below shows what is not read.
    emptied = {**params, "embed": jax.tree.map(jnp.zeros_like, params["embed"])}
    columns = jnp.asarray([[1, 3, 5]] * 3)
    for own in (params, emptied):
        above = jax.jit(lambda p, low: model.apply(p, *args, lower=low))(own, lower)
        np.testing.assert_array_equal(above, got)
        some = jax.jit(lambda p, low: model.apply(p, *args, columns=columns, lower=low))(own, lower)
        np.testing.assert_allclose(some, got[:, [1, 3, 5]], rtol=1e-5, atol=1e-5)


# A CPU has no host memory to offload activations to.
@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"offload"}))
@pytest.mark.parametrize("model", [SHALLOW, DEEP], ids=["unrolled", "in a loop"])
def test_gradients_are_those_of_the_whole_model(model, remat):
    model, adapters, frozen = adapted(dataclasses.replace(model, remat=remat))
    tokens = rows()

    def loss(apply):
        def of(adapters, frozen):
            hidden = apply(combine(adapters, frozen), tokens.inputs, segment_ids=tokens.segment_ids)
            return jnp.sum(jnp.sin(hidden) * jnp.asarray(tokens.loss_mask)[..., None])

        return of

    def merged(params, *args, **kwargs):
        whole = merge_lora(model, params)[1]
        return dataclasses.replace(model, lora=None).apply(whole, *args, **kwargs)

    want = jax.grad(loss(merged), argnums=(0, 1))(adapters, frozen)
    got = jax.jit(jax.grad(loss(model.apply), argnums=(0, 1)))(adapters, frozen)
    largest = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(want))
    # The base has its gradient too, below the adapters as well: nothing is cut off.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * largest), got, want)


def test_the_backward_pass_ends_where_training_does():
    """A layer more below the adapters costs an update its forward pass: 9 matrix products."""

    def products(layers):
        plain = Decoder(dataclasses.replace(tiny.CONFIG, num_layers=layers))
        lora = dataclasses.replace(UPPER, targets=(rf"layers\.{layers - 1}\..*",))
        model, adapters, frozen = add_lora(
            plain, tiny.random_params(plain), jax.random.key(0), lora
        )

        def loss(adapters):
            return jnp.sum(model.apply(combine(adapters, frozen), rows().inputs))

        return jax.jit(jax.grad(loss)).lower(adapters).compile().as_text().count(" dot(")

    # Queries, keys, values, their scores and sums, the output, gate, up, down.
    assert products(4) - products(3) == 9


@pytest.mark.parametrize("remat", sorted(set(REMAT) - {"offload"}))
def test_the_backward_pass_keeps_no_copy_of_the_weights(remat):
    """Temporary memory of a loop over the upper ten of twelve layers, against one over all."""
    config = dataclasses.replace(
        tiny.CONFIG, num_layers=12, hidden_size=128, intermediate_size=384, head_dim=32
    )

    def temporary(first):
        plain = Decoder(config, remat=remat)
        layers = "|".join(str(layer) for layer in range(first, 12))
        lora = dataclasses.replace(UPPER, targets=(rf"layers\.(?:{layers})\..*",))
        model, adapters, frozen = add_lora(
            plain, tiny.random_params(plain), jax.random.key(0), lora
        )

        def loss(adapters, frozen):
            return jnp.sum(model.apply(combine(adapters, frozen), rows().inputs))

        compiled = jax.jit(jax.grad(loss)).lower(adapters, frozen).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(2) < 1.05 * temporary(0)


def test_split_over_devices():
    """Rows and their length in parts: lower states have the tokens in their own order."""
    model, adapters, frozen = adapted(SHALLOW)
    params = combine(adapters, frozen)
    inputs = np.random.default_rng(2).integers(3, tiny.VOCAB, (4, 32)).astype(np.int32)
    want = model.apply(params, inputs)
    mesh = make_mesh(data=2, sequence=4, devices=jax.devices()[:8])
    with jax.set_mesh(mesh):
        lower = jax.jit(model.lower_states)(params, inputs)
        got = jax.jit(lambda p, low: model.apply(p, inputs, lower=low))(params, lower)
    assert isinstance(lower, LowerStates)
    np.testing.assert_allclose(lower.hidden, model.lower_states(params, inputs).hidden, atol=1e-4)
    np.testing.assert_allclose(got, want, atol=1e-4)
