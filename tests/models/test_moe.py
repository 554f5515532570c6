"""Experts: adapters, rematerialisation, a mesh, and the router's loss in every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from jaxalign.algorithms import sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state
from jaxalign.hf import load_pretrained, save_pretrained
from jaxalign.models.base import combine, read, read_counts
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import add_lora, merge_lora
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, shard_batch

CONFIG = dataclasses.replace(
    tiny.CONFIG, num_experts=4, experts_per_token=2, router_aux_coef=0.5, family="mixtral"
)
MODEL = Decoder(CONFIG)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(MODEL)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(2)
    return [tiny.document(rng, length) for length in (5, 9, 3, 7, 8, 4, 6, 10)]


def batch_of(documents, groups, length=24):
    return tiny.token_batch(tiny.lay(documents, groups, length))


def test_adapters_on_experts_start_as_the_base_and_merge(params):
    model, adapters, base = add_lora(MODEL, params, jax.random.key(0))
    assert adapters["blocks"]["mlp"]["gate"]["lora_a"].shape == (2, 4, 32, 16)
    assert "router" not in adapters["blocks"]["mlp"]
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 8))
    plain, adapted = jax.jit(MODEL.apply), jax.jit(model.apply)
    np.testing.assert_allclose(
        adapted(combine(adapters, base), ids), plain(params, ids), 1e-5, 1e-5
    )
    noise = np.random.default_rng(5)
    adapters = jax.tree.map(
        lambda x: jnp.asarray(0.1 * noise.normal(size=x.shape), x.dtype), adapters
    )
    both = combine(adapters, base)
    merged = merge_lora(model, both)[1]
    got = adapted(both, ids)
    assert np.abs(got - plain(params, ids)).max() > 0.1
    np.testing.assert_allclose(got, plain(merged, ids), 1e-4, 1e-4)


def loss_of(model):
    def loss(params, batch):
        hidden, extra = read(model, params, batch)
        seen = jnp.where(batch.segment_ids[..., None] > 0, jnp.sin(hidden), 0)
        return jnp.sum(seen) + extra["router"].total

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module")
def plain(params, documents):
    return loss_of(MODEL)(params, batch_of(documents, tiny.alone(8)))


def close(one, other):
    np.testing.assert_allclose(one[0], other[0], 1e-5)
    for got, want in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        scale = np.abs(want).max() + 1e-6  # nothing flows to the head
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-5)


def test_rematerialisation(params, documents, plain):
    model = dataclasses.replace(MODEL, remat="block")
    close(loss_of(model)(params, batch_of(documents, tiny.alone(8))), plain)


def test_on_a_mesh_each_device_sorts_its_own_rows(params, documents, plain):
    mesh = make_mesh(fsdp=2, tensor=2, expert=2)
    batch = shard_batch(batch_of(documents, tiny.alone(8)), mesh)
    placed = jax.device_put(params, param_shardings(MODEL.axes, mesh, MODEL.shapes))
    with jax.set_mesh(mesh):
        compiled = loss_of(MODEL).lower(placed, batch).compile()
        close(jax.device_get(compiled(placed, batch)), plain)
    # 8 rows of 24 tokens over 4 shards, 2 experts each: a device holds its own tokens, and those of
    # the device with the other experts.
    assert "s32[192]" in compiled.as_text()
    assert "s32[384]" not in compiled.as_text()


def test_router_loss_does_not_depend_on_the_layout(params, documents):
    """Alone in a row and in one piece, or packed and in micro-batches."""
    tx = optax.sgd(0.1)
    whole = jax.jit(sft.make_step(MODEL, tx))
    parts = jax.jit(sft.make_step(MODEL, tx, micro_batches=2))
    _, want = whole(init_state(params, tx), batch_of(documents, tiny.alone(8)))
    assert float(want["router"]) > 0.5 * 2  # at least coefficient × experts a token
    assert float(want["weight/router"]) == sum(len(one["inputs"]) for one in documents)
    packed = batch_of(documents, [[0, 1, 2], [3, 4], [5, 6], [7]])
    _, got = parts(init_state(params, tx), packed)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], 1e-4, err_msg=name)


def test_read_gives_a_term_to_mixtures_only(params, documents):
    batch = batch_of(documents, tiny.alone(8))
    assert set(read_counts(Scorer(MODEL), batch)) == {"router"}
    off = Decoder(dataclasses.replace(CONFIG, router_aux_coef=0.0))
    for model in (off, tiny.DECODER, object()):
        assert read_counts(model, batch) == {}

    class Own:
        def apply(self, params, inputs, positions, segment_ids):
            return positions

    hidden, extra = read(Own(), {}, batch)
    assert hidden is batch.positions
    assert extra == {}
    with pytest.raises(TypeError, match="branch_ids"):
        read(Own(), {}, batch._replace(branch_ids=batch.positions))


def test_a_step_on_a_mesh_compiles_once(params, documents):
    mesh = make_mesh(fsdp=4, tensor=2)
    tx = optax.sgd(0.1)
    placed = jax.device_put(params, param_shardings(MODEL.axes, mesh, MODEL.shapes))
    state = init_state(placed, tx)
    step = compile_step(sft.make_step(MODEL, tx), state, mesh)
    batch = batch_of(documents, tiny.alone(8))
    state, first = step(state, batch)
    _, second = step(state, batch)
    assert float(second["loss"]) < float(first["loss"])
    assert step.compiles == 1


def test_experts_in_one_tensor_are_read_too(params, tmp_path):
    """As transformers 5 holds them: all experts of a layer, gate and up joined, `[E, out, in]`."""
    save_pretrained(MODEL, params, tmp_path / "one")
    found = load_file(tmp_path / "one/model.safetensors")
    joined = {
        k.replace("block_sparse_moe", "mlp"): v for k, v in found.items() if "experts" not in k
    }
    for layer in range(2):
        block = f"model.layers.{layer}.block_sparse_moe.experts"
        each = {
            w: np.stack([found[f"{block}.{e}.{w}.weight"] for e in range(4)])
            for w in ("w1", "w2", "w3")
        }
        name = f"model.layers.{layer}.mlp.experts"
        joined[f"{name}.gate_up_proj"] = np.concatenate([each["w1"], each["w3"]], axis=1)
        joined[f"{name}.down_proj"] = each["w2"]
    (tmp_path / "joined").mkdir()
    save_file(joined, tmp_path / "joined/model.safetensors")
    config = (tmp_path / "one/config.json").read_text()
    (tmp_path / "joined/config.json").write_text(config)
    _, again = load_pretrained(tmp_path / "joined")
    jax.tree.map(np.testing.assert_array_equal, again, params)
