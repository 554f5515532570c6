"""Rows that a mesh splits in time: ring and Ulysses against a plain softmax, and what they send."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_attention import inputs_of, mask_of, plain, rows_of_documents

from jaxalign.models.attention import exchange, flash
from jaxalign.models.attention.flash_kernels import Tokens
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.attention.xla import attend
from jaxalign.models.backend import backend
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.rules import current_sequence_attention, use_rules
from jaxalign.parallel.sharding import param_shardings, shard_batch
from jaxalign.parallel.zigzag import zigzag_columns
from jaxalign.plan.costs import count_costs
from jaxalign.plan.hlo import parse

ROWS, WINDOW = 2, 5

CASES = {
    # Kind of attention, exchange, mesh, length, zigzag, options.
    "ring": ("xla", "ring", {"fsdp": 2, "sequence": 4}, 32, True, {"softcap": 3.0}),
    "ring-2": ("xla", "ring", {"fsdp": 2, "sequence": 2, "tensor": 2}, 28, True, {}),
    "ring-8": ("xla", "ring", {"fsdp": 1, "sequence": 8}, 30, False, {"softcap": 3.0}),
    "ulysses": ("xla", "ulysses", {"fsdp": 2, "sequence": 4}, 30, False, {"softcap": 3.0}),
    "ulysses-pallas": ("pallas", "ulysses", {"sequence": 2, "tensor": 2}, 30, False, {}),
    "ulysses-splash": ("splash", "ulysses", {"fsdp": 4, "sequence": 2}, 160, False, {}),
}


def random_row(rng, length, branches):
    """ids, positions, branches or None, `[ROWS, length]`: documents across the borders of parts."""
    ids, positions = rows_of_documents(rng, ROWS, length)
    if not branches:
        return ids, positions, None
    return ids, positions, rng.integers(0, 3, (ROWS, length)).astype(np.int32)


@pytest.mark.parametrize("name", CASES)
def test_random_cases(name):
    """Outputs and gradients to 1e-5 of their largest; windows that hold and do not."""
    kind, how, sizes, length, zigzag, options = CASES[name]
    softcap, branches = options.get("softcap"), kind != "splash"
    columns = np.arange(length)
    if zigzag:
        columns = zigzag_columns(length, sizes["sequence"])
    back = np.argsort(columns)

    @jax.jit
    def ours(inputs, segments, windowed, weights):
        spec = MaskSpec(
            segments, segments, window=WINDOW, windowed=windowed, zigzag=zigzag, exchange=how
        )

        def total(inputs):
            out = attend(*(x[:, columns] for x in inputs), spec, 0.4, softcap, kind=kind)
            return jnp.sum(weights * out[:, back]), out[:, back]

        return jax.value_and_grad(total, has_aux=True)(inputs)

    @jax.jit
    def theirs(inputs, mask, weights):
        def total(inputs):
            out = plain(*inputs, mask, 0.4, softcap)
            return jnp.sum(weights * out), out

        return jax.value_and_grad(total, has_aux=True)(inputs)

    rng = np.random.default_rng(length)
    mesh = make_mesh(**sizes)
    for case in range(2 if kind == "splash" else 4):
        ids, positions, branch = random_row(rng, length, branches)
        inputs = inputs_of(rng, ROWS, length)
        real = (ids > 0)[..., None, None]
        weights = jnp.asarray(rng.normal(size=inputs[0].shape) * real, jnp.float32)
        segments = jax.tree.map(lambda x: x[:, columns], Segments(ids, positions, branch))
        mask = mask_of(ids, positions, WINDOW if case % 2 else length, branch)
        with jax.set_mesh(mesh):
            got = ours(inputs, segments, np.asarray(bool(case % 2)), weights)
        (_, got_out), got_gradients = jax.device_get(got)
        (_, out), gradients = jax.device_get(theirs(inputs, mask, weights))
        np.testing.assert_allclose(got_out * real, np.nan_to_num(out) * real, atol=2e-5)
        for a, b in zip(got_gradients, gradients, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, np.abs(b).max()))


def test_bfloat16_is_rounded_once():
    """The parts of a ring add up in float32: as near to float64 as one device is."""
    rng = np.random.default_rng(0)
    length = 64
    ids, positions = np.ones((ROWS, length), np.int32), np.arange(length)[None] * np.ones((ROWS, 1))
    inputs = [x.astype(jnp.bfloat16) for x in inputs_of(rng, ROWS, length)]
    exact = plain(*(x.astype(jnp.float32) for x in inputs), mask_of(ids, positions), 0.4, None)

    def error(how, mesh):
        segments = Segments(ids, positions.astype(np.int32))
        spec = MaskSpec(segments, segments, exchange=how)
        with jax.set_mesh(mesh):
            out = jax.jit(lambda *x: attend(*x, spec, 0.4))(*inputs)
        return float(np.abs(np.asarray(out, np.float32) - exact).max())

    alone = error("gather", make_mesh(devices=jax.devices()[:1]))
    assert error("ring", make_mesh(fsdp=1, sequence=8)) < 1.5 * alone


# What is sent and held, from the compiled text of one pass over a model and its gradient.

LAYERS, LENGTH, HEADS, KV_HEADS, WIDTH = 3, 1024, 8, 4, 16
PARTS = 4
MODEL = Decoder(
    dataclasses.replace(
        tiny.CONFIG, num_layers=LAYERS, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH,
        hidden_size=48,
    )
)  # fmt: skip


@functools.cache
def compiled(how):
    """The text of loss and gradient with rows split over four devices."""
    mesh = make_mesh(sequence=PARTS, devices=jax.devices()[:PARTS])
    params = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        MODEL.shapes,
        param_shardings(MODEL.axes, mesh, MODEL.shapes),
    )
    ids = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    def loss(params, ids):
        return jnp.sum(jnp.square(MODEL.apply(params, ids)))

    with jax.set_mesh(mesh), use_rules(None, sequence_attention=how):
        lowered = jax.jit(jax.grad(loss)).lower(params, ids)
    return lowered.compile().as_text()


def formula(how):
    """Bytes a device sends by kind of collective: the module's docstring, forward and backward."""
    n, token = PARTS, LENGTH * WIDTH * 4  # float32
    part = 2 * KV_HEADS * token / n  # a device's keys and values
    reorder = 2 * LENGTH * 48 * 4 / n  # hidden states back into their order, and their gradients
    if how == "ring":
        turns = LAYERS * part * (2 * (n - 1) + n)
        return {"collective-permute": turns + reorder * (n - 1) / n}
    if how == "ulysses":
        return {"all-to-all": LAYERS * 2 * 2 * (HEADS + KV_HEADS) * token * (n - 1) / n**2}
    return {"all-gather": LAYERS * part * (n - 1), "reduce-scatter": LAYERS * part * (n - 1)}


@pytest.mark.parametrize("how", ["ring", "ulysses"])
def test_traffic_is_as_the_formula_says(how):
    found = count_costs(compiled(how), [0] * PARTS).collectives
    for kind, want in formula(how).items():
        assert abs(found[kind].inner / want - 1) < 0.1, (kind, found[kind].inner, want)
    assert "all-gather" not in found or found["all-gather"].inner < 0.1 * sum(
        formula("gather").values()
    )


@pytest.mark.parametrize("how", ["gather", "ring", "ulysses"])
def test_keys_and_values_are_whole_under_gather_only(how):
    """No array of numbers has a row's length and all heads of keys and values."""
    whole = set()
    for computation in parse(compiled(how)).computations.values():
        for instruction in computation:
            for shape in instruction.shapes:
                if shape.dtype == "f32" and math.prod(shape.dims) == LENGTH * KV_HEADS * WIDTH:
                    whole.add(shape.dims)
    queries = {dims for dims in whole if LENGTH not in dims}
    assert bool(whole - queries) == (how == "gather"), whole


def test_every_turn_of_a_ring_costs_all_devices_the_same():
    """In zigzag order, in blocks of the Pallas kernels: within 5 % of an even split."""
    parts, length, block = 8, 8192, 64
    size, ones = length // parts, jnp.ones((1, length // parts), jnp.int32)

    def slowest(columns):
        own = jnp.asarray(columns).reshape(parts, 1, size)
        work = np.zeros((parts, parts))
        for device, source in np.ndindex(parts, parts):
            query, key = Tokens(own[device], ones), Tokens(own[source], ones)
            visible = flash.visible_blocks(query, key, jnp.full(1, length), block, block)
            work[(device - source) % parts, device] = np.asarray(visible).sum()
        return work.max(1).sum() / (work.sum() / parts)  # a turn lasts as long as its longest

    assert slowest(zigzag_columns(length, parts)) < 1.05
    assert slowest(np.arange(length)) > 1.7


def test_sft_does_not_depend_on_the_exchange():
    """Hidden states and gradients of a model with windows on some layers, packed rows, to 1e-5."""
    config = dataclasses.replace(
        tiny.CONFIG, window=5, window_layers=(True, False), attention_softcap=4.0
    )
    model = Decoder(config, remat="block")
    params, rng = tiny.random_params(model), np.random.default_rng(3)
    ids = rng.integers(3, tiny.VOCAB, (4, 21))
    segments, positions = (np.tile(x, (2, 1)) for x in rows_of_documents(rng, 2, 21))
    weights = rng.normal(size=(4, 21, config.hidden_size)) * (segments > 0)[..., None]

    def loss(params, ids, positions, segments):
        return jnp.sum(weights * model.apply(params, ids, positions, segments))

    def run(mesh, how):
        with jax.set_mesh(mesh), use_rules(None, sequence_attention=how):
            placed = jax.device_put(params, param_shardings(model.axes, mesh, model.shapes))
            batch = shard_batch((ids, positions, segments), mesh)
            return jax.device_get(jax.jit(jax.value_and_grad(loss))(placed, *batch))

    want = run(make_mesh(devices=jax.devices()[:1]), "auto")
    for how in ("ring", "ulysses"):
        got = run(make_mesh(fsdp=2, sequence=2, tensor=2 if how == "ring" else 1,
                            devices=jax.devices()[: 8 if how == "ring" else 4]), how)  # fmt: skip
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, 0, 1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    ("asked", "kind", "sizes", "heads", "length", "want"),
    [
        # Of 8 parts with 8 heads of keys and values each gets one; with 2 parts it sends more.
        ("auto", "pallas", {"sequence": 8}, (32, 8), 2**17, "ulysses (sends least)"),
        ("auto", "splash", {"sequence": 8}, (32, 8), 2**17, "ulysses (sends least)"),
        ("auto", "pallas", {"sequence": 2}, (32, 8), 2**12, "gather (a layer's keys and"),
        ("auto", "pallas", {"sequence": 2}, (32, 8), 2**17, "ulysses (a layer's keys and"),
        # 4 heads of queries on a device and 1 of keys and values, over 8 parts.
        ("auto", "pallas", {"sequence": 8, "tensor": 8}, (32, 8), 2**12, "gather (a layer's"),
        ("auto", "pallas", {"sequence": 2}, (3, 3), 2**18, "gather (pallas attention has no ring"),
        ("auto", "xla", {"sequence": 2}, (3, 3), 2**18, "ring (a layer's keys"),
        ("ring", "xla", {"sequence": 8}, (32, 8), 64, "ring (asked for)"),
        ("gather", "xla", {"sequence": 8}, (32, 8), 2**20, "gather (asked for)"),
        ("ulysses", "xla", {"sequence": 4}, (8, 2), 64, "ulysses (asked for)"),
        ("ulysses", "xla", {"sequence": 4}, (6, 2), 64, None),
    ],
)
def test_which_exchange_and_why(asked, kind, sizes, heads, length, want, monkeypatch):
    config = dataclasses.replace(
        tiny.CONFIG, num_heads=heads[0], num_kv_heads=heads[1], head_dim=128
    )
    most = dataclasses.replace(backend(), gathered_bytes=2**28)
    monkeypatch.setattr(exchange, "backend", lambda: most)
    sizes = {"data": 1, "fsdp": 1} | sizes
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with jax.sharding.use_abstract_mesh(mesh):
        if want is None:
            with pytest.raises(ValueError, match="6 heads and 2 of keys and values on a device"):
                exchange.choose_exchange(asked, kind, config, 1, length, "bfloat16")
            return
        got = exchange.choose_exchange(asked, kind, config, 1, length, "bfloat16")
    assert str(got).startswith(want), got


def test_the_option_is_part_of_the_rules():
    with use_rules(None, sequence_attention="ring"):
        assert current_sequence_attention() == "ring"
        with use_rules({"mlp": None}):
            assert current_sequence_attention() == "ring"
    assert current_sequence_attention() == "auto"
    message = re.escape("sequence_attention='rings': wanted one of auto, gather, ring, ulysses")
    with pytest.raises(ValueError, match=message), use_rules(None, sequence_attention="rings"):
        pass
