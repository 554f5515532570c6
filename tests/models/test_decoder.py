"""The decoder against a plain numpy Llama, and against itself in every other way of running it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import plain_llama
import pytest
import tiny

from jaxalign.models.base import DecoderConfig, RopeConfig, combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.layer_loop import REMAT
from jaxalign.models.rope import rope_tables
from jaxalign.models.scorer import pooled_scores

APPLY = jax.jit(tiny.DECODER.apply)
LINEAR = dataclasses.replace(tiny.CONFIG, rope=RopeConfig(kind="linear", factor=3.0), head_dim=6)


@pytest.mark.parametrize(
    "config", [tiny.CONFIG, tiny.BIASED, LINEAR], ids=["gqa", "tied-bias-llama3", "linear"]
)
def test_forward_equals_plain_numpy(config):
    model = Decoder(config)
    params = tiny.random_params(model)
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 40))
    hidden = jax.jit(model.apply)(params, ids)
    logits = model.logits(params, hidden)
    for row in range(2):
        want = plain_llama.forward(config, params, ids[row])
        np.testing.assert_allclose(hidden[row], want, 1e-4, 1e-4)
        np.testing.assert_allclose(
            logits[row], plain_llama.logits(config, params, ids[row]), 1e-4, 2e-4
        )


def test_rope_kinds_differ():
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (1, 40))
    params = tiny.random_params(tiny.DECODER)
    base = APPLY(params, ids)
    for kind in ("linear", "llama3"):
        rope = RopeConfig(kind=kind, factor=4.0, original_max_positions=32)
        other = jax.jit(Decoder(dataclasses.replace(tiny.CONFIG, rope=rope)).apply)(params, ids)
        assert np.abs(other - base).max() > 1e-2


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(2)
    return [tiny.document(rng, length) for length in (5, 9, 3, 7)]


def hidden_of(params, rows):
    batch = tiny.token_batch(rows)
    return np.asarray(APPLY(params, batch.inputs, batch.positions, batch.segment_ids))


def test_packed_documents_do_not_see_each_other(params, documents):
    packed = tiny.lay(documents, [[0, 1, 2], [3]], 18)
    hidden = hidden_of(params, packed)
    for row, segment, which in ((0, 1, 0), (0, 2, 1), (0, 3, 2), (1, 1, 3)):
        here = packed["segment_ids"][row] == segment
        want = plain_llama.forward(tiny.CONFIG, params, documents[which]["inputs"])
        np.testing.assert_allclose(hidden[row, here], want, 1e-4, 1e-4)


def test_left_padding_changes_nothing(params, documents):
    padded = tiny.lay(documents, tiny.alone(4), 12, left=True)
    hidden = hidden_of(params, padded)
    for row, one in enumerate(documents):
        want = plain_llama.forward(tiny.CONFIG, params, one["inputs"])
        np.testing.assert_allclose(hidden[row, -len(want) :], want, 1e-4, 1e-4)
    assert np.isfinite(hidden).all()


def test_no_token_sees_a_later_one(params):
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (1, 10))
    changed = ids.copy()
    changed[0, 6] += 1
    one, other = APPLY(params, ids), APPLY(params, changed)
    np.testing.assert_array_equal(one[0, :6], other[0, :6])
    assert np.all(np.abs(one[0, 6:] - other[0, 6:]).max(-1) > 1e-3)


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.BIASED], ids=["gqa", "biased"])
def test_decoding_with_a_cache_equals_the_full_forward(config):
    model = Decoder(config)
    params = tiny.random_params(model)
    documents = [tiny.document(np.random.default_rng(2), length) for length in (4, 9, 6)]
    rows = tiny.lay(documents, tiny.alone(3), 9, left=True)
    batch = tiny.token_batch(rows)
    full = jax.jit(model.apply)(params, batch.inputs, batch.positions, batch.segment_ids)
    extend = jax.jit(model.extend)
    cache, got = model.init_cache(3, 12), []
    for start, stop in ((0, 5), (5, 6), (6, 7), (7, 9)):  # prefill, tokens, a pair
        here = (slice(None), slice(start, stop))
        hidden, cache = extend(
            params, cache, batch.inputs[here], batch.positions[here], batch.segment_ids[here]
        )
        got.append(hidden)
    assert int(cache.used) == 9
    given = batch.segment_ids > 0
    np.testing.assert_allclose(np.concatenate(got, 1)[given], full[given], 1e-5, 1e-5)


@pytest.fixture(scope="module")
def plain_gradient(params):
    return value_and_gradient(tiny.DECODER, params)


def value_and_gradient(model, params):
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 8))
    return jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(model.apply(p, ids)))))(params)


@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_rematerialisation_changes_neither_values_nor_gradients(params, plain_gradient, remat):
    model = dataclasses.replace(tiny.DECODER, remat=remat)
    value, grads = value_and_gradient(model, params)
    np.testing.assert_allclose(value, plain_gradient[0], 1e-5)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(plain_gradient[1]), strict=True):
        np.testing.assert_allclose(one, other, 1e-4, 1e-5)


def test_rematerialisation_recomputes(params):
    def saved(remat):
        model = dataclasses.replace(tiny.DECODER, remat=remat)
        ids = np.zeros((2, 8), np.int32)
        _, backward = jax.vjp(lambda p: model.apply(p, ids), params)
        return sum(x.size for x in jax.tree.leaves(backward))

    assert saved("block") < saved("dots") < saved("none")


def test_bfloat16_computes_narrow_and_keeps_float32_logits(params):
    model = dataclasses.replace(tiny.DECODER, compute_dtype="bfloat16")
    ids = np.random.default_rng(1).integers(0, tiny.VOCAB, (2, 8))
    hidden = jax.jit(model.apply)(params, ids)
    assert hidden.dtype == jnp.bfloat16
    assert model.logits(params, hidden).dtype == jnp.float32
    want = APPLY(params, ids)
    gap = np.abs(np.asarray(hidden, np.float32) - want)
    assert 0 < gap.mean() < 0.05


def test_the_parameter_tree_is_the_documented_one():
    L, D, F, V = 2, 32, 48, tiny.VOCAB
    want = {
        "embed/embedding": ((V, D), "vocab embed"),
        "blocks/attention_norm/scale": ((L, D), "layers norm"),
        "blocks/attention/query/kernel": ((L, D, 32), "layers embed heads/8"),
        "blocks/attention/key/kernel": ((L, D, 16), "layers embed kv_heads"),
        "blocks/attention/value/kernel": ((L, D, 16), "layers embed kv_heads"),
        "blocks/attention/out/kernel": ((L, 32, D), "layers heads/8 embed"),
        "blocks/mlp_norm/scale": ((L, D), "layers norm"),
        "blocks/mlp/gate/kernel": ((L, D, F), "layers embed mlp"),
        "blocks/mlp/up/kernel": ((L, D, F), "layers embed mlp"),
        "blocks/mlp/down/kernel": ((L, F, D), "layers mlp embed"),
        "norm/scale": ((D,), "norm"),
        "head/kernel": ((D, V), "embed vocab"),
    }
    shapes, axes = flat(tiny.DECODER.shapes), flat(tiny.DECODER.axes)
    assert {k: (v.shape, axes[k]) for k, v in shapes.items()} == want
    biased = Decoder(tiny.BIASED)
    extra = set(flat(biased.shapes)) - set(want)
    assert len(extra) == 7
    assert set(want) - set(flat(biased.shapes)) == {"head/kernel"}
    assert flat(biased.axes)["blocks/attention/out/bias"] == "layers norm"
    fresh = flat(jax.jit(biased.init)(jax.random.key(0)))
    assert {k: v.shape for k, v in fresh.items()} == {
        k: v.shape for k, v in flat(biased.shapes).items()
    }
    assert np.all(np.asarray(fresh["norm/scale"]) == 1)
    embedding = np.asarray(fresh["embed/embedding"])
    # Four standard errors of a standard deviation, σ/√(2n).
    assert abs(embedding.std() - 0.02) < 4 * 0.02 / np.sqrt(2 * embedding.size)
    layers = np.asarray(fresh["blocks/mlp/gate/kernel"])
    assert np.abs(layers[0] - layers[1]).max() > 0.01


def flat(tree, prefix=""):
    found = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return found


def test_reference_forward(shared):
    """Hugging Face's Llama: hidden states, logits, left padding, pooled reward."""
    vectors = np.load(shared / "oracle/forward.npz")
    params = oracle.load(shared / "oracle/policy.safetensors", oracle.DECODER)
    rows = oracle.rows(vectors["input_ids"], vectors["attention_mask"])
    run = jax.jit(oracle.DECODER.apply)
    hidden = run(params, rows.inputs, rows.positions, rows.segment_ids)
    given = vectors["attention_mask"] == 1
    np.testing.assert_allclose(hidden[given], vectors["last_hidden"][given], 1e-5, 1e-5)
    logits = oracle.DECODER.logits(params, hidden)
    np.testing.assert_allclose(logits[given], vectors["logits"][given], 1e-5, 1e-5)

    rows = oracle.rows(vectors["left_input_ids"], vectors["left_attention_mask"])
    given = vectors["left_attention_mask"] == 1
    hidden = run(params, rows.inputs, rows.positions, rows.segment_ids)
    logits = oracle.DECODER.logits(params, hidden)
    np.testing.assert_allclose(logits[given], vectors["left_logits"][given], 1e-5, 1e-5)


def test_reference_pooled_reward(shared):
    judge = oracle.load(shared / "oracle/reward.safetensors", oracle.SCORER)
    vectors = np.load(shared / "oracle/forward.npz")
    rows = oracle.rows(vectors["input_ids"], vectors["attention_mask"])
    pool = jax.jit(pooled_scores, static_argnums=0)
    scores = pool(oracle.SCORER, judge, rows)
    np.testing.assert_allclose(scores, vectors["reward_logits"][:, 0], 1e-5, 1e-5)

    vectors = np.load(shared / "oracle/ppo_get_reward.npz")
    rows = oracle.rows(vectors["query_responses"], vectors["query_responses"] != 0)
    hidden = jax.jit(oracle.SCORER.apply)(judge, rows.inputs, rows.positions, rows.segment_ids)
    given = vectors["query_responses"] != 0
    np.testing.assert_allclose(
        oracle.SCORER.scores(judge, hidden)[given],
        vectors["reward_logits"][..., 0][given],
        1e-5,
        1e-5,
    )
    np.testing.assert_allclose(
        pool(oracle.SCORER, judge, rows), vectors["final_rewards"], 1e-5, 1e-5
    )


def test_bad_shapes_and_options_are_refused():
    sizes = dataclasses.asdict(tiny.CONFIG) | {"rope": RopeConfig()}
    for wrong in ({"num_heads": 3}, {"head_dim": 7}, {"num_layers": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DecoderConfig(**(sizes | wrong))
    with pytest.raises(ValueError, match=r"rope kind='axial'.*supported"):
        RopeConfig(kind="axial")
    with pytest.raises(ValueError, match=r"remat='some'.*none, dots, block"):
        Decoder(tiny.CONFIG, remat="some")
    with pytest.raises(ValueError, match=r"compute_dtype='int8'"):
        Decoder(tiny.CONFIG, compute_dtype="int8")


def test_combine_merges_disjoint_trees_only():
    assert combine({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3}) == {"a": {"x": 1, "y": 2}, "b": 3}
    assert combine({"a": 1}, {}) == {"a": 1}
    with pytest.raises(ValueError, match="'x' is both trainable and frozen"):
        combine({"a": {"x": 1}}, {"a": {"x": 2}})


@pytest.mark.parametrize("kind", [np.int32, np.uint8, np.int16])
def test_rotations_do_not_depend_on_the_type_of_positions(kind):
    """Position 0 is the smallest of unsigned types, and is rotated by nothing: cosine 1, sine 0."""
    positions = np.array([[0, 1, 2]], kind)
    cos, sin = rope_tables(RopeConfig(theta=10_000.0), 4, positions)
    angles = np.array([0, 1, 2])[:, None] * np.array([1.0, 0.01])
    np.testing.assert_allclose(cos[0, :, 0], np.cos(angles), rtol=1e-6)
    np.testing.assert_allclose(sin[0, :, 0], np.sin(angles), rtol=1e-6)
