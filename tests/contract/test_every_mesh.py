"""Every mesh of 8 devices gives what one device gives, for every algorithm, with experts.

Most of this takes minutes and is marked slow. How a state lies on each mesh is kept in
`golden_shardings/`; after a change that is meant, write them anew:

    JAXALIGN_WRITE_GOLDEN=1 python -m pytest tests/contract/test_every_mesh.py -k layout
"""

import dataclasses
import functools
import itertools
import math
import os
import pathlib

import jax
import pytest
import tiny
from cases import make_cases
from preference_cases import kto_case
from test_contract import same

from jaxalign.algorithms import ppo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.rules import use_rules
from jaxalign.parallel.sharding import param_shardings, partition_spec

AXES = ("data", "fsdp", "tensor", "sequence", "expert")

SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=5) if math.prod(s) == 8]

# Heads and experts for up to eight shards.
CONFIG = dataclasses.replace(
    tiny.CONFIG, num_heads=8, num_kv_heads=4, num_experts=8, experts_per_token=2,
    router_aux_coef=0.1, family="mixtral",
)  # fmt: skip
DECODER = Decoder(CONFIG)
SCORER = Scorer(DECODER)
CASES = {case.name: case for case in (*make_cases(DECODER, SCORER), kto_case(DECODER))}

ALWAYS = {("sft", (1, 1, 2, 2, 2))}

GOLDEN = pathlib.Path(__file__).parent / "golden_shardings"


def name_of(shape):
    return "-".join(f"{axis}{size}" for axis, size in zip(AXES, shape, strict=True))


@functools.cache
def alone(name):
    """One device: (new parameters, metrics)."""
    case = CASES[name]
    state, metrics = case.jitted()(case.state(), case.padded())
    return jax.device_get((state.params, metrics))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(
            name, shape, id=f"{name}-{name_of(shape)}",
            marks=() if (name, shape) in ALWAYS else pytest.mark.slow,
        )
        for name in CASES
        for shape in SHAPES
    ],
)  # fmt: skip
def test_every_mesh_gives_what_one_device_gives(name, shape):
    case = CASES[name]
    mesh = make_mesh(**dict(zip(AXES, shape, strict=True)))
    state = case.state(param_shardings(case.axes, mesh, case.shapes))
    step = compile_step(case.step(case.tx), state, mesh)
    same(alone(name), step(state, case.padded()))


@pytest.mark.parametrize("how", ["ring", "ulysses"])
def test_how_devices_along_sequence_exchange_does_not_show(how):
    case = CASES["sft"]
    mesh = make_mesh(fsdp=2, sequence=2, tensor=2)
    with use_rules(None, sequence_attention=how):
        state = case.state(param_shardings(case.axes, mesh, case.shapes))
        step = compile_step(case.step(case.tx), state, mesh)
    same(alone("sft"), step(state, case.padded()))


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
def test_layout_on_every_mesh(shape):
    mesh = make_mesh(**dict(zip(AXES, shape, strict=True)))
    text = layout_of(mesh)
    file = GOLDEN / f"{name_of(shape)}.txt"
    if os.environ.get("JAXALIGN_WRITE_GOLDEN"):
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def layout_of(mesh):
    """A line an array of PPO's train state and of activations: shape, layout, shape on a device."""
    case = CASES["ppo"]
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        case.shapes,
        param_shardings(case.axes, mesh, case.shapes),
    )
    assert params.keys() == ppo.init_params(0, 0).keys()
    state = jax.eval_shape(case.tx.init, params)
    layouts = opt_state_shardings(params, case.tx)
    lines = [f"mesh {dict(mesh.shape)}"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        lines.append(line(f"params{jax.tree_util.keystr(path)}", leaf.shape, leaf.sharding))
    # Of the optimizer's state only what does not lie as its parameter does.
    own = {path: x.sharding for path, x in jax.tree_util.tree_leaves_with_path(params)}
    like = 0
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(layouts), strict=True
    ):
        if any(own.get(path[i:]) == sharding for i in range(len(path))):
            like += 1
        else:
            lines.append(line(f"optimizer{jax.tree_util.keystr(path)}", leaf.shape, sharding))
    lines.append(f"optimizer: {like} arrays lie as their parameters")
    for axes, shape in (
        ("rows", (8,)),
        ("rows length hidden", (8, 16, 32)),
        ("rows new hidden", (8, 1, 32)),
        ("rows vocab_logits", (8, 64)),
        ("rows length heads hidden", (8, 16, 8, 8)),
        ("cache_rows cache_heads cache_length hidden", (8, 8, 16, 8)),
    ):
        sharding = jax.sharding.NamedSharding(mesh, partition_spec(axes, mesh=mesh))
        lines.append(line(f"activation {axes}", shape, sharding))
    return "\n".join(lines) + "\n"


def line(name, shape, sharding):
    spec = ", ".join("×".join(x) if isinstance(x, tuple) else str(x) for x in sharding.spec)
    return f"{name} {shape} ({spec}) {sharding.shard_shape(shape)}"


def test_there_are_35_meshes():
    assert len(SHAPES) == 35
    assert len(list(GOLDEN.glob("*.txt"))) == 35
