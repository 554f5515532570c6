"""No array with T² elements in the steps of packed rows and shared prompts on NVIDIA GPUs."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.algorithms import dpo, ppo, reward, sft
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.models.attention import dispatch, kernels
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import PairBatch, RolloutBatch, SharedPairBatch, TokenBatch, TrainState

LENGTH = 8192
SLOTS = 4
KINDS = {"h100": (8, "NVIDIA H100 80GB HBM3"), "a100-80g": (4, "NVIDIA A100-SXM4-80GB")}

MODEL = Decoder(tiny.CONFIG, compute_dtype="bfloat16", remat="block")
SCORER = Scorer(MODEL)
TX = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"))


def pretend(monkeypatch, installed):
    """That cuDNN is installed or not, and what it is asked for, but for its call."""

    def by_cudnn(query, key, value, *, scale, is_causal, local_window_size, implementation):
        assert implementation == "cudnn"
        assert is_causal
        return query + jnp.sum(key) + jnp.sum(value)

    monkeypatch.setattr(dispatch, "_has_cudnn", lambda: installed)
    monkeypatch.setattr(kernels.jax.nn, "dot_product_attention", by_cudnn)


def tokens(rows, branches=False):
    ids = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    mask = jax.ShapeDtypeStruct((rows, LENGTH), jnp.bool_)
    return TokenBatch(ids, ids, ids, ids, mask, branch_ids=ids if branches else None)


def case(name, rows):
    """(axes and shapes of what is trained, step, batch)."""
    pairs = jax.ShapeDtypeStruct((rows, SLOTS), jnp.float32)
    exist = jax.ShapeDtypeStruct((rows, SLOTS), jnp.bool_)
    if name == "sft":
        return MODEL, sft.make_step(MODEL, TX), TX, tokens(rows)
    if name == "dpo":
        batch = SharedPairBatch(tokens(rows, branches=True), pairs, pairs, mask=exist)
        return MODEL, dpo.make_step(MODEL, TX), TX, batch
    if name == "reward":
        batch = PairBatch(tokens(rows), tokens(rows), mask=exist)
        return SCORER, reward.make_step(SCORER, TX), TX, batch
    values = jax.ShapeDtypeStruct((rows, LENGTH), jnp.float32)
    both, tx = _Both(), ppo.make_optimizer(TX, TX)
    step = ppo.make_step(MODEL, SCORER, tx, ppo.Config())
    return both, step, tx, RolloutBatch(tokens(rows), *(values,) * 5)


class _Both:
    axes = ppo.init_params(MODEL.axes, SCORER.axes)
    shapes = ppo.init_params(MODEL.shapes, SCORER.shapes)


def on(x, sharding):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def lowered(name, device):
    """The text of a step for GPUs that are not there: a mesh needs their number and kind only."""
    count, kind = KINDS[device]
    mesh = make_mesh(devices=jax.devices()[:count]).abstract_mesh
    mesh = mesh.update(abstract_device=jax.sharding.AbstractDevice(kind, None, "gpu"))
    model, step, tx, batch = case(name, count)
    params = jax.tree.map(on, model.shapes, param_shardings(model.axes, mesh, model.shapes))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("fsdp",)))
    rest = (jax.ShapeDtypeStruct((), jnp.int32), jax.eval_shape(tx.init, params))
    count, opt_state = jax.tree.map(lambda x: on(x, whole), rest)
    state = TrainState(count, params, {}, opt_state)
    batch = jax.tree.map(lambda x: on(x, split), batch)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(step).trace(state, batch).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("device", "cudnn"), [("h100", True), ("a100-80g", False)])
@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "ppo"])
def test_no_array_grows_with_the_square_of_the_length(name, device, cudnn, monkeypatch):
    pretend(monkeypatch, cudnn)
    text = lowered(name, device)
    shapes = {
        tuple(map(int, found.split("x")[:-1]))
        for found in re.findall(r"tensor<((?:\d+x)+)[a-z]\w*>", text)
    }
    assert "flash_to_keys" in text
    largest = max(shapes, key=math.prod)
    assert math.prod(largest) < LENGTH**2, largest
    assert not [shape for shape in shapes if shape.count(LENGTH) > 1]
