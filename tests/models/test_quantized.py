"""A quantised base: its values by plain numpy, its gradients, its bytes, and adapters over it."""

import dataclasses
import statistics
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.algorithms import sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.hf import save_pretrained
from jaxalign.hf.quantized_base import quantize_params, with_quantized_base
from jaxalign.models.base import DecoderConfig, combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, adapters_of, add_lora, dequantize_base, merge_lora
from jaxalign.models.quantized import (
    QUANTIZED,
    dequantize,
    is_quantized,
    map_quantized,
    quantize,
    require_qwix,
)
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings

pytest.importorskip("qwix", reason="a quantised base needs qwix")

# Dettmers et al. 2023, appendix E; bitsandbytes has them in float32.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
], np.float32)  # fmt: skip

CONFIG = DecoderConfig(
    vocab_size=tiny.VOCAB,
    hidden_size=128,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
LORA = LoraConfig(rank=2, alpha=4.0, targets=("query", "down"))


def matrix(rows, columns, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32)


def by_numpy(w, block):
    """Codes and scales of NF4, block by block, as bitsandbytes goes through the transpose."""
    rows, columns = w.shape
    codes = np.zeros(w.shape, np.uint8)
    scales = np.zeros((rows // block, columns), np.float32)
    for column in range(columns):
        for number in range(rows // block):
            part = slice(number * block, (number + 1) * block)
            values = w[part, column]
            scales[number, column] = np.abs(values).max()
            apart = np.abs(values[:, None] / scales[number, column] - NF4)
            codes[part, column] = apart.argmin(1)
    return codes, scales


def test_the_published_values_are_the_quantiles_of_a_normal_distribution():
    normal = statistics.NormalDist().inv_cdf
    positive = [normal(p) for p in np.linspace(0.9677083, 0.5, 9)[:-1]]
    negative = [-normal(p) for p in np.linspace(0.9677083, 0.5, 8)[:-1]]
    values = np.array(sorted([*positive, 0.0, *negative]))
    np.testing.assert_allclose(NF4, values / values.max(), 0, 1e-6)


@pytest.mark.parametrize(("rows", "block"), [(192, 64), (64, 64), (48, 48), (130, 26)])
def test_nf4_is_the_papers_block_by_block(rows, block):
    w = matrix(rows, 6)
    w[:block, 0] = 0
    codes, scales = by_numpy(np.where(w == 0, np.float32(1e-30), w), block)
    codes[:block, 0] = 7  # the code of 0
    parts = jax.jit(lambda x: quantize(x, "nf4"))(w)
    packed = np.asarray(parts["packed"])
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(packed >> 4, codes[0::2])  # as bitsandbytes: first above
    np.testing.assert_array_equal(packed & 15, codes[1::2])
    got = np.asarray(parts["scales"])
    np.testing.assert_array_equal(got[:, 1:], scales[:, 1:])
    want = NF4[codes] * np.repeat(scales, block, axis=0)
    np.testing.assert_array_equal(np.asarray(jax.jit(dequantize)(parts))[:, 1:], want[:, 1:])
    assert not np.any(dequantize(parts)[:block, 0])


def test_a_value_of_the_table_is_kept_as_it_is():
    w = np.tile(NF4, 4)[:, None] * np.array([[1.0, 0.5, 3.0]], np.float32)
    np.testing.assert_array_equal(dequantize(quantize(jnp.asarray(w), "nf4")), w)


def test_double_quantisation_keeps_the_scales_in_8_bits():
    w = matrix(128, 512) * np.linspace(0.5, 2, 512, dtype=np.float32)
    single, double = (quantize(jnp.asarray(w), kind) for kind in ("nf4", "nf4-double"))
    np.testing.assert_array_equal(single["packed"], double["packed"])
    scales = np.asarray(single["scales"], np.float64)
    mean = scales.mean()
    groups = (scales - mean).reshape(2, 2, 256)
    steps = np.abs(groups).max(-1) / 127.5
    assert double["scales"].dtype == jnp.int8
    np.testing.assert_allclose(double["scale_mean"], [[mean]], 1e-6)
    np.testing.assert_allclose(double["scale_steps"], steps, 1e-5)
    whole = np.clip(np.round(groups / steps[..., None]), -128, 127)
    assert np.abs(np.asarray(double["scales"]).reshape(groups.shape) - whole).max() <= 1
    restored = (whole * steps[..., None]).reshape(2, 512) + mean
    codes = by_numpy(w, 64)[0]
    want = NF4[codes] * np.repeat(restored, 64, axis=0)
    # One more step where a quotient lies between two whole numbers.
    np.testing.assert_allclose(dequantize(double), want, 0, 1.01 * steps.max())
    assert np.abs(np.asarray(dequantize(double)) - want).mean() < 0.01 * steps.max()


def test_int8_has_a_scale_for_each_output():
    w = matrix(40, 6) * np.array([1, 2, 3, 4, 5, 6], np.float32)
    parts = quantize(jnp.asarray(w), "int8")
    scales = np.abs(w).max(0) / 127.5
    np.testing.assert_allclose(parts["scales"], scales[None], 1e-6)
    assert parts["values"].dtype == jnp.int8
    # The nearest of 255 values; ±127.5, where a column is largest, becomes ±127 or −128.
    values = np.asarray(parts["values"], np.float64)
    assert (np.abs(values - w / scales) <= 0.5 + 1e-4).all()
    np.testing.assert_allclose(dequantize(parts), values * scales, 1e-6)


# --- bytes ---------------------------------------------------------------------------------------

LLAMA_8B = DecoderConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
    num_kv_heads=8, head_dim=128,
)  # fmt: skip
SMOLLM = DecoderConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    num_kv_heads=3, head_dim=64, tie_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("config", [LLAMA_8B, SMOLLM], ids=["8B", "135M"])
@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.563), ("nf4-double", 0.52), ("int8", 1.01)])
def test_bytes_a_weight(config, kind, most):
    """Of shapes: at most 0.6 of a byte each in 4 bits, whatever their layout."""
    count = sum(x.size for x in jax.tree.leaves(Decoder(config).shapes["blocks"]) if x.ndim > 2)
    blocks, total = Decoder(config, quantize=kind).shapes["blocks"], 0

    def add(parts):
        nonlocal total
        total += sum(x.size * x.dtype.itemsize for x in parts.values())

    map_quantized(add, blocks)
    assert most * 0.95 < total / count < most


@pytest.fixture(scope="module")
def floats():
    return tiny.random_params(Decoder(CONFIG))


@pytest.fixture(scope="module", params=QUANTIZED)
def quantized(request, floats):
    """(model, parameters, the floats that they stand for)."""
    model = with_quantized_base(Decoder(CONFIG), request.param)
    params = quantize_params(floats, model)
    return model, params, dequantize_base(model, params)[1]


def test_parameters_are_those_that_the_model_says(quantized):
    model, params, _ = quantized
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), model.shapes)
    assert jax.tree.structure(model.axes) == jax.tree.structure(params)
    fresh = jax.eval_shape(model.init, jax.random.key(0))
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)
    kept = {
        path[-1].key: leaf.dtype
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key in ("embedding", "scale") or path[0].key == "head"
    }
    assert set(kept.values()) == {np.dtype(np.float32)}


def test_rounding_is_as_large_as_it_should_be(quantized, floats):
    """Mean error over mean size: 9 % for 16 values a block of 64, 0.7 % for 255 a column."""
    model, _, rounded = quantized
    errors = []
    for name, node in floats["blocks"]["mlp"].items():
        wrong = np.abs(np.asarray(rounded["blocks"]["mlp"][name]["kernel"]) - node["kernel"])
        errors.append(wrong.mean() / np.abs(node["kernel"]).mean())
    low, high = (0.004, 0.01) if model.quantize == "int8" else (0.08, 0.1)
    assert low < min(errors) <= max(errors) < high


def batch(lengths=(4, 9, 7, 3, 8, 5, 6, 9)):
    rng = np.random.default_rng(0)
    documents = [tiny.document(rng, length) for length in lengths]
    return tiny.token_batch(tiny.lay(documents, tiny.alone(len(lengths)), max(lengths)))


def adapters(model, params, config=LORA):
    """(adapted model, adapters with values that matter, frozen)."""
    model, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    rng = np.random.default_rng(1)

    def moved(x):
        return x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype)

    return model, jax.tree.map(moved, trained), frozen


def objective(model, frozen):
    rows = batch()

    def value(trained):
        hidden = model.apply(combine(trained, frozen), rows.inputs)
        return jnp.sum(jnp.sin(hidden) * jnp.arange(hidden.shape[-1])[None, None])

    return jax.jit(jax.value_and_grad(value))


@pytest.mark.parametrize("remat", ["none", "block"])
def test_forward_and_backward_are_those_of_the_floats(quantized, remat):
    model, params, floats = quantized
    model = dataclasses.replace(model, remat=remat)
    adapted, trained, frozen = adapters(model, params)
    plain = dataclasses.replace(adapted, quantize=None)
    got, gradients = objective(adapted, frozen)(trained)
    want, wanted = objective(plain, floats)(trained)
    np.testing.assert_allclose(got, want, 1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(trained)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-4 * np.abs(other).max())


def test_decoding_reads_it_as_whole_rows_do(quantized):
    model, params, _ = quantized
    ids = batch().inputs[:2]
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    ones = np.ones((2, 9), np.int32)
    want = jax.jit(model.apply)(params, ids)
    got, _ = jax.jit(model.extend)(
        model.by_layer(params), model.init_cache(2, 9), ids, positions, ones
    )
    np.testing.assert_allclose(got, want, 1e-4, 1e-5)


def test_half_precision_multiplies_rounded_floats(quantized):
    """The product is that of the same floats, rounded to bfloat16 once."""
    model, params, floats = quantized
    half = dataclasses.replace(model, compute_dtype="bfloat16")
    got = jax.jit(half.apply)(params, batch().inputs)
    assert got.dtype == jnp.bfloat16
    plain = dataclasses.replace(half, quantize=None)
    want = jax.jit(plain.apply)(floats, batch().inputs)
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), 0.01, 0.01)


# --- training ------------------------------------------------------------------------------------


def test_eight_devices_train_as_one(quantized):
    model, params, _ = quantized
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    layout = param_shardings(model.axes, mesh, model.shapes)
    dense = param_shardings(Decoder(CONFIG).axes, mesh, Decoder(CONFIG).shapes)
    for part, name in (("attention", "query"), ("attention", "out"), ("mlp", "down")):
        node, spec = layout["blocks"][part][name]["kernel"], dense["blocks"][part][name]["kernel"]
        heavy = node["values"] if "values" in node else node["packed"]
        assert heavy.spec == spec.spec
    if model.quantize == "nf4":  # 2 blocks of rows on 2 devices; 3 blocks are whole on each
        scales = [layout["blocks"]["mlp"][name]["kernel"]["scales"].spec for name in ("up", "down")]
        assert [tuple(spec) for spec in scales] == [
            (None, "fsdp", "tensor"),
            (None, None, "fsdp"),
        ]
    results = []
    for placed, where in ((jax.device_put(params, layout), mesh), (params, None)):
        adapted, trained, frozen = add_lora(model, placed, jax.random.key(0), LORA)
        tx = make_optimizer(OptimizerConfig(learning_rate=1e-2, schedule="constant"))
        state, step = init_state(trained, tx, frozen), sft.make_step(adapted, tx)
        run = jax.jit(step) if where is None else compile_step(step, state, where)
        losses = []
        for _ in range(3):
            state, metrics = run(state, batch())
            losses.append((float(metrics["loss"]), float(metrics["grad_norm"])))
        results.append(losses)
        frozen_now = jax.tree.map(np.asarray, state.frozen)
        jax.tree.map(np.testing.assert_array_equal, frozen_now, jax.device_get(params))
    np.testing.assert_allclose(*results, 2e-5)
    assert results[0][-1][0] < results[0][0][0] - 0.01


def test_only_adapters_have_moments_and_gradients(quantized):
    """In bytes: two moments of each adapter, and no float of the base in the step's memory."""
    model, params, _ = quantized
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), LORA)
    tx = make_optimizer()
    state = init_state(trained, tx, frozen)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(t)) for t in (state.opt_state, trained)]
    assert 2 * sizes[1] <= sizes[0] < 2 * sizes[1] + 64
    assert sizes[1] == 4 * 2 * 2 * (128 + 128 + 192 + 128)
    gradients = jax.eval_shape(objective(adapted, frozen), trained)[1]
    assert jax.tree.structure(gradients) == jax.tree.structure(trained)
    # A deep model: a copy of its base in floats for the backward pass would be seen.
    deep = dataclasses.replace(adapted, config=dataclasses.replace(CONFIG, num_layers=16))
    shapes = deep.shapes
    split = dataclasses.replace(deep, lora=None).shapes
    start = jax.eval_shape(lambda: init_state(_zeros(adapters_of(shapes)), tx, _zeros(split)))
    compiled = jax.jit(sft.make_step(deep, tx)).lower(start, batch((4,))).compile()
    in_floats = 4 * sum(x.size for x in jax.tree.leaves(Decoder(deep.config).shapes["blocks"]))
    assert compiled.memory_analysis().temp_size_in_bytes < in_floats / 4


def _zeros(shapes):
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


# --- kinds of adapters and of models -------------------------------------------------------------


def test_lengths_of_dora_are_those_of_the_rounded_columns(quantized):
    model, params, floats = quantized
    config = LoraConfig(rank=2, targets=("up",), dora=True)
    adapted, trained, frozen = add_lora(model, params, jax.random.key(0), config)
    kernel = np.asarray(floats["blocks"]["mlp"]["up"]["kernel"], np.float64)
    lengths = trained["blocks"]["mlp"]["up"]["lora_m"]
    np.testing.assert_allclose(lengths, np.linalg.norm(kernel, axis=1), 1e-5)
    rows = batch().inputs
    start = jax.jit(adapted.apply)(combine(trained, frozen), rows)
    np.testing.assert_allclose(start, jax.jit(model.apply)(params, rows), 1e-4, 1e-4)


def test_experts_compute_and_learn_as_in_floats():
    config = dataclasses.replace(CONFIG, num_experts=4, experts_per_token=2, head_dim=32)
    model = with_quantized_base(Decoder(config), "nf4")
    params = quantize_params(tiny.random_params(Decoder(config)), model)
    assert is_quantized(params["blocks"]["mlp"]["up"]["kernel"])
    assert params["blocks"]["mlp"]["up"]["kernel"]["packed"].shape == (2, 4, 64, 192)
    assert not isinstance(params["blocks"]["mlp"]["router"]["kernel"], dict)
    adapted, trained, frozen = adapters(model, params)
    plain, floats = dequantize_base(adapted, frozen)
    got, gradients = objective(adapted, frozen)(trained)
    want, wanted = objective(plain, floats)(trained)
    np.testing.assert_allclose(got, want, 1e-5)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-4 * np.abs(other).max())


def test_merging_says_what_is_lost(quantized):
    model, params, floats = quantized
    adapted, trained, frozen = adapters(model, params)
    together = combine(trained, frozen)
    with pytest.raises(ValueError, match=r"would keep that rounding.*dequantize=True"):
        merge_lora(adapted, together)
    plain, merged = merge_lora(adapted, together, dequantize=True)
    assert plain == Decoder(CONFIG)
    node = trained["blocks"]["mlp"]["down"]
    for layer in range(2):
        want = floats["blocks"]["mlp"]["down"]["kernel"][layer] + 2.0 * (
            np.asarray(node["lora_a"][layer]) @ np.asarray(node["lora_b"][layer])
        )
        np.testing.assert_allclose(merged["blocks"]["mlp"]["down"]["kernel"][layer], want, 0, 1e-5)
    untouched = merged["blocks"]["mlp"]["up"]["kernel"]
    np.testing.assert_array_equal(untouched, floats["blocks"]["mlp"]["up"]["kernel"])


# --- bad input -----------------------------------------------------------------------------------


def test_misuse_is_refused(floats, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="quantize='nf5': wanted one of nf4, nf4-double, int8"):
        Decoder(CONFIG, quantize="nf5")
    model = with_quantized_base(Decoder(CONFIG), "nf4")
    params = quantize_params(floats, model)
    for config, message in (
        (LoraConfig(init="pissa"), "init=pissa with a quantised base"),
        (LoraConfig(targets=("query",), modules_to_save=("down",)), "mlp.down is quantised"),
    ):
        with pytest.raises(ValueError, match=message):
            add_lora(model, params, jax.random.key(0), config)
    with pytest.raises(ValueError, match="quantised: dequantise it first"):
        save_pretrained(model, params, tmp_path / "out")
    for rows in (97, 202):
        with pytest.raises(ValueError, match=f"a matrix with {rows} rows does not divide"):
            quantize(jnp.ones((rows, 4)), "nf4")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxalign\[quant\]'"):
        require_qwix()
