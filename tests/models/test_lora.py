"""Adapters: start equal, merge equal, train alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxalign.algorithms import sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, add_lora, merge_lora
from jaxalign.models.network import abstract_block, with_values
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


# --- patterns, scales, DoRA, PiSSA, embedding and head -------------------------------------------

MIXED = LoraConfig(
    rank=4,
    alpha=6.0,
    targets=("query", r"layers\.0\..*down", "value", "embed", "lm_head"),
    rank_pattern={r"layers\.1\..*query": 2, "lm_head": 3},
    alpha_pattern={r"layers\.1\..*value": 9.0},
    rslora=True,
    modules_to_save=("norm", "mlp_norm"),
)
LENGTHS = LoraConfig(
    rank=3, alpha=6.0, targets=("key", "up", "embed", "lm_head"), dora=True, init="peft",
    rank_pattern={r"layers\.0\..*key": 1},
)  # fmt: skip


def trained_by_hand(trained, seed=0):
    """Values that matter in every adapter; what is 0 in A, and its row of B, stays 0."""
    rng = np.random.default_rng(seed)

    def draw(node):
        if not isinstance(node, dict):
            return node * jnp.asarray(1 + 0.2 * rng.normal(size=node.shape), node.dtype)
        made = {name: draw(value) for name, value in node.items()}
        if "lora_a" in node:
            a = np.asarray(node["lora_a"])
            used = np.any(a != 0, axis=-2) | ~np.any(a != 0)
            a = 0.3 * rng.normal(size=a.shape) * used[..., None, :]
            b = 0.3 * rng.normal(size=node["lora_b"].shape) * used[..., :, None]
            made |= {"lora_a": jnp.asarray(a, jnp.float32), "lora_b": jnp.asarray(b, jnp.float32)}
        return made

    return draw(trained)


@pytest.fixture(scope="module", params=[MIXED, LENGTHS], ids=["mixed", "lengths"])
def rich(request, base):
    """(options, adapted model, trained values, frozen) of a tied model."""
    model, trained, frozen = add_lora(Decoder(tiny.BIASED), base, jax.random.key(2), request.param)
    rows = batch()
    plain = jax.jit(Decoder(tiny.BIASED).apply)(base, rows.inputs)
    start = jax.jit(model.apply)(combine(trained, frozen), rows.inputs)
    np.testing.assert_allclose(start, plain, 1e-5, 1e-5)
    return request.param, model, trained_by_hand(trained), frozen


def logits(model):
    return jax.jit(lambda params, ids: model.logits(params, model.apply(params, ids)))


def numpy_merged(matrix, node, scale, dora):
    whole = np.asarray(matrix, np.float64) + scale * (
        np.asarray(node["lora_a"], np.float64) @ np.asarray(node["lora_b"], np.float64)
    )
    if not dora:
        return whole
    return whole / np.linalg.norm(whole, axis=0) * np.asarray(node["lora_m"], np.float64)


def test_every_kind_merges_as_numpy_says(rich, base):
    config, model, trained, frozen = rich
    together = combine(trained, frozen)
    plain, merged = merge_lora(model, together)
    # On a tied model the look-up and the head have adapters of their own.
    assert model.config.tie_embeddings
    assert not plain.config.tie_embeddings
    # Logits reach 10: 5e-5 are a few of their last bits, and products differ by processor.
    np.testing.assert_allclose(
        logits(plain)(merged, batch().inputs), logits(model)(together, batch().inputs), 1e-5, 5e-5
    )
    table = base["embed"]["embedding"]
    if config is MIXED:
        scales = {"query": (6 / 2, 6 / 2**0.5), "value": (6 / 2, 9 / 2), "down": (6 / 2, 6 / 2)}
        embed, head = 6 / 2, 6 / 3**0.5
    else:
        scales = {"key": (6 / 1, 6 / 3), "up": (6 / 3, 6 / 3)}
        embed, head = 6 / 3, 6 / 3
    for part in ("attention", "mlp"):
        for name, node in merged["blocks"][part].items():
            for layer in range(2):
                want = base["blocks"][part][name]["kernel"][layer]
                if name in scales:
                    own = {k: v[layer] for k, v in trained["blocks"][part][name].items()}
                    want = numpy_merged(want, own, scales[name][layer], config.dora)
                np.testing.assert_allclose(node["kernel"][layer], want, 0, 2e-6)
    for got, matrix, node, scale in (
        (merged["embed"]["embedding"], table, trained["embed"], embed),
        (merged["head"]["kernel"], table.T, trained["head"], head),
    ):
        np.testing.assert_allclose(got, numpy_merged(matrix, node, scale, config.dora), 0, 2e-6)


def test_decoding_reads_adapters_as_whole_rows_do(rich):
    _, model, trained, frozen = rich
    together, ids = combine(trained, frozen), batch().inputs[:2]
    want = jax.jit(model.apply)(together, ids)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    ones = np.ones((2, 9), np.int32)
    first, cache = jax.jit(model.prefill)(together, ids, positions, ones)
    np.testing.assert_allclose(first, want, 1e-5, 1e-5)
    for params in (together, model.by_layer(together)):
        cache = model.init_cache(2, 9)
        got, _ = jax.jit(model.extend)(params, cache, ids, positions, ones)
        np.testing.assert_allclose(got, want, 1e-4, 1e-5)


def test_columns_that_a_layer_lacks_stay_zero(base):
    model, trained, frozen = add_lora(Decoder(tiny.BIASED), base, jax.random.key(2), MIXED)
    query = trained["blocks"]["attention"]["query"]
    assert query["lora_a"].shape == (2, 32, 4)
    assert np.abs(query["lora_a"][1, :, :2]).min() > 0
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-1, schedule="constant", weight_decay=0.1))
    state = init_state(trained, tx, frozen)
    # Bytes: two moments of what is trained, and a few counters; nothing of the base.
    sizes = [sum(x.nbytes for x in jax.tree.leaves(tree)) for tree in (state.opt_state, trained)]
    assert 2 * sizes[1] <= sizes[0] < 2 * sizes[1] + 64
    saved = {"norm": {"scale": (32,)}, "blocks": {"mlp_norm": {"scale": (2, 32)}}}
    shapes = jax.tree.map(lambda x: x.shape, state.params)
    assert shapes["norm"] == saved["norm"]
    assert shapes["blocks"]["mlp_norm"] == saved["blocks"]["mlp_norm"]
    assert set(shapes["blocks"]["mlp"]) == {"down"}
    assert "mlp_norm" not in frozen["blocks"]
    step = jax.jit(sft.make_step(model, tx))
    for _ in range(3):
        state, _ = step(state, batch())
    query, down = (
        state.params["blocks"][p][n] for p, n in (("attention", "query"), ("mlp", "down"))
    )
    for node, layer, columns in ((query, 1, slice(2, None)), (down, 1, slice(None))):
        assert not np.any(node["lora_a"][layer][:, columns])
        assert not np.any(node["lora_b"][layer][columns])
    assert np.abs(query["lora_b"][1, :2]).min() > 0
    assert np.abs(down["lora_b"][0]).min() > 0
    assert np.abs(state.params["norm"]["scale"] - base["norm"]["scale"]).max() > 1e-2


def test_gradients_of_dora_are_those_of_its_paper(base):
    """‖W + s·A·B‖ counts as a constant: compared with a plain statement of the layer."""
    config = LoraConfig(rank=2, alpha=3.0, targets=("up",), dora=True)
    model, trained, frozen = add_lora(Decoder(tiny.BIASED), base, jax.random.key(2), config)
    trained = trained_by_hand(trained)
    linear = trained["blocks"]["mlp"]["up"]
    x = jax.random.normal(jax.random.key(4), (5, 32))
    w = base["blocks"]["mlp"]["up"]["kernel"][0]

    def stated(a, b, m):
        whole = w + 1.5 * a @ b
        norm = jax.lax.stop_gradient(jnp.linalg.norm(whole, axis=0))
        return jnp.sum(jnp.sin(x @ whole * (m / norm)[None]))

    graph, state = abstract_block(model.config, config)
    block = jax.tree.map(lambda y: y[0], combine(trained, frozen)["blocks"])

    def ours(a, b, m):
        up = block["mlp"]["up"] | {"lora_a": a, "lora_b": b, "lora_m": m}
        layer = nnx.merge(graph, with_values(state, block | {"mlp": block["mlp"] | {"up": up}}))
        bias = block["mlp"]["up"]["bias"]
        return jnp.sum(jnp.sin(layer.mlp.up(x[None])[0] - bias[None]))

    factors = [linear[name][0] for name in ("lora_a", "lora_b", "lora_m")]
    want, wanted = jax.value_and_grad(stated, (0, 1, 2))(*factors)
    got, gradients = jax.value_and_grad(ours, (0, 1, 2))(*factors)
    np.testing.assert_allclose(got, want, 1e-5)
    for one, other in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)


def test_principal_vectors_are_those_of_numpy(base):
    config = LoraConfig(
        rank=3, alpha=6.0, targets=("key", "down"), init="pissa",
        rank_pattern={r"layers\.0\..*key": 2},
    )  # fmt: skip
    model, trained, frozen = add_lora(Decoder(tiny.BIASED), base, jax.random.key(2), config)
    for part, name, layer, rank in (("attention", "key", 0, 2), ("attention", "key", 1, 3),
                                    ("mlp", "down", 1, 3)):  # fmt: skip
        w = np.asarray(base["blocks"][part][name]["kernel"][layer], np.float64)
        node = jax.tree.map(lambda x, i=layer: np.asarray(x[i]), trained["blocks"][part][name])
        u, s, v = np.linalg.svd(w, full_matrices=False)
        largest = (u[:, :rank] * s[:rank]) @ v[:rank]
        np.testing.assert_allclose(6 / rank * node["lora_a"] @ node["lora_b"], largest, 0, 1e-5)
        rest = frozen["blocks"][part][name]["kernel"][layer]
        np.testing.assert_allclose(rest, w - largest, 0, 1e-5)
        # A and B are alike in size: √(S/s) each.
        np.testing.assert_allclose(
            np.linalg.norm(node["lora_a"], axis=0)[:rank], np.sqrt(s[:rank] * rank / 6), 1e-4
        )
    assert frozen["embed"]["embedding"] is base["embed"]["embedding"]
    start = jax.jit(model.apply)(combine(trained, frozen), batch().inputs)
    plain = jax.jit(Decoder(tiny.BIASED).apply)(base, batch().inputs)
    np.testing.assert_allclose(start, plain, 0, 1e-4)


def test_pefts_default_is_uniform(base):
    config = LoraConfig(rank=8, init="peft", targets=("down", "embed"))
    _, trained, _ = add_lora(Decoder(tiny.BIASED), base, jax.random.key(2), config)
    drawn = np.asarray(trained["blocks"]["mlp"]["down"]["lora_a"]) * np.sqrt(48)
    assert np.abs(drawn).max() <= 1
    # Of a uniform value within ±1: σ = 1/√3, and σ of σ is below 0.6 σ/√n.
    assert abs(drawn.std() - 3**-0.5) < 4 * 0.6 / np.sqrt(drawn.size)
    assert not np.any(trained["embed"]["lora_a"])
    assert abs(float(jnp.std(trained["embed"]["lora_b"])) - 1) < 4 / np.sqrt(2 * 8 * 32)


def test_all_of_it_is_the_same_on_a_mesh(rich):
    config, model, trained, frozen = rich
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    together = combine(trained, frozen)
    layout = param_shardings(model.axes, mesh, model.shapes)
    rows = batch()

    def loss(params):
        return jnp.mean(jnp.sin(model.logits(params, model.apply(params, rows.inputs))))

    grad = jax.value_and_grad(lambda t, f: loss(combine(t, f)))
    want = jax.jit(grad)(trained, frozen)
    placed = jax.device_put(together, layout)
    pick = jax.tree.map(lambda _: True, trained)

    def part(tree, like):
        return {k: part(tree[k], v) if isinstance(v, dict) else tree[k] for k, v in like.items()}

    with jax.set_mesh(mesh):
        got = jax.jit(grad)(part(placed, pick), part(placed, frozen))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 2e-6), got, want)
    # Fresh adapters of a placed base lie on its mesh.
    plain = Decoder(tiny.BIASED)
    base = {k: v for k, v in merge_lora(model, together)[1].items() if k != "head"}
    base = jax.device_put(base, param_shardings(plain.axes, mesh, plain.shapes))
    _, fresh, _ = add_lora(plain, base, jax.random.key(0), config)
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(fresh))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"targets": (r"layers\.2\..*",)}, r"targets: .* is nothing that this model has; it has "
         r"embed, layers\.0\.attention\.key.*lm_head \(layers 0 to 1\)"),
        ({"rank_pattern": {"gate.": 2}}, "rank_pattern: 'gate.' is nothing"),
        ({"rank": 17}, r"rank=17 is above that of blocks\.attention\.key, a matrix of 32 x 16"),
        ({"targets": ("embed",), "modules_to_save": ("embed",)}, "embed has adapters too"),
        ({"modules_to_save": ("elbow",)}, r"modules_to_save: 'elbow' .* it has .*embed.*norm"),
        ({"targets": (r"layers\.0\..*",), "dora": True}, "in some layers only"),
        ({"targets": ("lm_head",), "init": "pissa"}, "lm_head, which is the embedding here"),
    ],
)  # fmt: skip
def test_what_a_model_cannot_have_is_refused(base, options, told):
    with pytest.raises(ValueError, match=told):
        add_lora(Decoder(tiny.BIASED), base, jax.random.key(0), LoraConfig(**options))


def test_options_out_of_range_are_refused():
    for options, told in (
        ({"dropout": 0.1}, "dropout=0.1: wanted 0. Training draws no random numbers"),
        ({"targets": ("layers.(",)}, "no regular expression"),
        ({"init": "svd"}, "init='svd': wanted one of gaussian, peft, pissa"),
        ({"rank_pattern": {"query": 0}}, r"rank_pattern\['query'\]=0: wanted a positive integer"),
    ):
        with pytest.raises(ValueError, match=told):
            LoraConfig(**options)
    # The order of patterns counts, so configurations that differ in it are not the same.
    one, other = ({"query": 1, ".*query": 2}, {".*query": 2, "query": 1})
    assert LoraConfig(rank_pattern=one) != LoraConfig(rank_pattern=other)
    assert hash(LoraConfig(rank_pattern=one)) == hash(LoraConfig(rank_pattern=dict(one)))
