"""What devices send each other in a compiled step: never a whole optimizer state, logits or more
than one layer's parameters at a time."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny

from jaxalign.algorithms import sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, replicated
from jaxalign.plan.costs import COLLECTIVES
from jaxalign.plan.hlo import parse
from jaxalign.types import TokenBatch, TrainState

# Sizes that tell which array is which: 7 layers, 32 wide, 48 inside, 80 words.
CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=7, vocab_size=80)
ROWS, LENGTH = 16, 64


@functools.cache
def abstract_step(mesh, remat):
    """A train step compiled from shapes alone, as text."""
    model = Decoder(CONFIG, remat=remat)
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-3, schedule="constant"))
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        model.shapes,
        param_shardings(model.axes, mesh, model.shapes),
    )
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        opt_state_shardings(params, tx),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(count, params, {}, opt_state)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    batch = TokenBatch(ids, ids, ids, ids, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_))
    step = compile_step(sft.make_step(model, tx, sft.Config()), state, mesh)
    return step.lower(state, batch).compile().as_text()


def gathered(text):
    """Shapes that all-gathers give, one entry an operand."""
    found = []
    for result in re.findall(r"= (.+?) all-gather(?:-start)?\(", text):
        found += [
            tuple(int(n) for n in dims.split(",") if n)
            for dims in re.findall(r"[a-z]+\d+\[([\d,]*)\]", result)
        ]
    return found


MESHES = [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "sequence": 2}]


@pytest.mark.parametrize("sizes", MESHES, ids=["fsdp8", "2x2x2"])
def test_no_all_gather_of_more_than_a_layer(sizes):
    mesh = make_mesh(**sizes)
    text = abstract_step(mesh, "block")
    shapes = gathered(text)
    assert shapes  # parameters are gathered
    width, words = CONFIG.hidden_size, CONFIG.vocab_size
    head = width * words
    for shape in shapes:
        assert CONFIG.num_layers not in shape, f"all layers at once: {shape}"
        tokens = ROWS * LENGTH // (sizes["fsdp"] * sizes.get("sequence", 1))
        assert math.prod(shape) <= max(head, tokens * sizes.get("sequence", 1) * width), shape
    # The embedding for the lookup, the head for both passes; their moments never.
    whole = [shape for shape in shapes if math.prod(shape) == head]
    assert len(whole) <= 4, whole
    logits = [shape for shape in shapes if shape and shape[-1] in (words, words // 2)
              and math.prod(shape) > head]  # fmt: skip
    assert not logits


def sent(text):
    """Collectives: (kind, whether it is in a loop, shapes sent, shapes received)."""
    module = parse(text)
    looped = set()

    def mark(name):
        if name not in looped:
            looped.add(name)
            for x in module.computations[name]:
                for other in re.findall(r"%([\w.\-]+)", x.attributes):
                    if other in module.computations:
                        mark(other)

    for computation in module.computations.values():
        for x in computation:
            if x.opcode == "while":
                mark(x.called("body"))
    for name, computation in module.computations.items():
        for x in computation:
            kind = x.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                shapes = [shape.dims for shape in computation.operand_shapes(x)]
                yield kind, name in looped, shapes, [shape.dims for shape in x.shapes]


@pytest.mark.parametrize("sizes", MESHES, ids=["fsdp8", "2x2x2"])
def test_the_head_is_gathered_once_and_its_gradient_reduced_once(sizes):
    """However many chunks of positions the head reads: nothing of it is sent in their loop."""
    mesh = make_mesh(**sizes)
    words = CONFIG.vocab_size // sizes.get("tensor", 1)
    whole, part = (CONFIG.hidden_size, words), (CONFIG.hidden_size // sizes["fsdp"], words)
    found = list(sent(abstract_step(mesh, "block")))
    assert not [one for one in found if one[1] and {whole, part} & {*one[2], *one[3]}]
    gathers = [one for one in found if one[0] == "all-gather" and whole in one[3]]
    assert len(gathers) == 1, gathers
    # Over fsdp it is scattered; the parts are then added up over what else splits tokens.
    reductions = [one for one in found if one[0] in ("all-reduce", "reduce-scatter")]
    assert sum(one[2].count(whole) for one in reductions) == 1
    assert sum(one[2].count(part) for one in reductions) == ("sequence" in sizes)


def test_the_reader_finds_all_gathers():
    text = """
  %all-gather = f32[32,48]{1,0} all-gather(%x), dimensions={0}
  %ag.1 = (f32[4,80]{1,0}, f32[32,80]{1,0}) all-gather-start(%y), dimensions={0}
  %other = f32[7,7]{1,0} add(%all-gather, %z)
"""
    assert gathered(text) == [(32, 48), (4, 80), (32, 80)]
