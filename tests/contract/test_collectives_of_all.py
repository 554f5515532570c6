"""As `test_collectives` for SFT, for the other algorithms: what one operation may gather."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxalign.algorithms import dpo, ppo, reward
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, replicated
from jaxalign.types import PairBatch, RolloutBatch, TokenBatch, TrainState

# Sizes that tell which array is which: 7 layers, 32 wide, 48 inside, 80 words.
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=7, vocab_size=80)
ROWS, LENGTH = 16, 64
MESHES = {"fsdp8": {"fsdp": 8}, "2x2x2": {"fsdp": 2, "tensor": 2, "sequence": 2}}


def made(algorithm):
    """(axes, shapes, optimizer, step, batch, models, rows that a pass takes together)."""
    model = Decoder(CONFIG, remat="block")
    scorer = Scorer(model)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="constant"))
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    tokens = TokenBatch(ids, ids, ids, ids, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_))
    numbers = jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    if algorithm == "reward":
        step = reward.make_step(scorer, tx, reward.Config())
        return scorer.axes, scorer.shapes, tx, step, PairBatch(tokens, tokens), 1, 2 * ROWS
    if algorithm == "dpo":
        step = dpo.make_step(model, tx, dpo.Config())
        pairs = PairBatch(tokens, tokens, numbers, numbers)
        return model.axes, model.shapes, tx, step, pairs, 1, 2 * ROWS
    tx = ppo.make_optimizer(tx, tx)
    step = ppo.make_step(model, scorer, tx, ppo.Config())
    each = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
    axes, shapes = (
        ppo.init_params(*both)
        for both in ((model.axes, scorer.axes), (model.shapes, scorer.shapes))
    )
    return axes, shapes, tx, step, RolloutBatch(tokens, *(each,) * 5), 2, ROWS


def abstract(shapes, layout):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout
    )


@functools.cache
def program(algorithm, name):
    mesh = make_mesh(**MESHES[name])
    axes, shapes, tx, step, batch, *_ = made(algorithm)
    params = abstract(shapes, param_shardings(axes, mesh, shapes))
    opt_state = abstract(jax.eval_shape(tx.init, params), opt_state_shardings(params, tx))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(count, params, {}, opt_state)
    return compile_step(step, state, mesh).lower(state, batch).compile().as_text()


def gathers(text):
    """The shapes that each all-gather gives."""
    return [
        [
            tuple(int(n) for n in dims.split(",") if n)
            for dims in re.findall(r"[a-z]+\d+\[([\d,]*)\]", result)
        ]
        for result in re.findall(r"= (.+?) all-gather(?:-start)?\(", text)
    ]


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        pytest.param(*case, marks=() if case == ("ppo", "2x2x2") else pytest.mark.slow)
        for case in ((a, m) for a in ("reward", "dpo", "ppo") for m in MESHES)
    ],
)
def test_no_operation_gathers_more_than_a_layer(algorithm, name):
    *_, models, rows = made(algorithm)
    sizes, found = MESHES[name], gathers(program(algorithm, name))
    assert found  # parameters are gathered
    width, words = CONFIG.hidden_size, CONFIG.vocab_size
    table = width * words
    layer = sum(math.prod(x.shape[1:]) for x in jax.tree.leaves(Decoder(CONFIG).shapes["blocks"]))
    # Of activations a device gathers a part of time at most, of its own rows.
    activations = rows * LENGTH * width // sizes["fsdp"]
    for shapes in found:
        assert sum(map(math.prod, shapes)) <= max(table, layer, activations), shapes
        for shape in shapes:
            assert CONFIG.num_layers not in shape, f"all layers at once: {shape}"
            is_logits = bool(shape) and shape[-1] in (words, words // sizes.get("tensor", 1))
            assert not (is_logits and math.prod(shape) > table), f"logits: {shape}"
    # Embeddings for the lookup, the head for both passes; their moments never.
    whole = [shape for shapes in found for shape in shapes if math.prod(shape) == table]
    assert len(whole) <= 4 * models, whole
