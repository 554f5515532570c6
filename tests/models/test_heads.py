"""Chunked log-probabilities against whole logits; scalar heads and where they are read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import plain_llama
import pytest
import tiny

from jaxalign.algorithms.optim import make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import target_logprobs
from jaxalign.models.scorer import Scorer, pooled_scores, weigh_attributes, with_scalar_head
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import TokenBatch


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 11, 32)).astype(np.float32)
    return jnp.asarray(hidden), rng.integers(0, tiny.VOCAB, (3, 11))


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER)


def naive(params, hidden, targets, temperature):
    """From the whole logits, in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
    logits /= temperature
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    chosen = np.take_along_axis(probs, targets[..., None], -1)[..., 0]
    return np.log(chosen), -(probs * np.log(probs)).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [None, 1, 4, 11, 50])
def test_chunks_do_not_show(params, inputs, chunk, temperature):
    hidden, targets = inputs
    logprobs, entropy = target_logprobs(
        tiny.DECODER, params, hidden, targets, temperature, entropy=True, chunk=chunk
    )
    want = naive(params, hidden, targets, temperature)
    np.testing.assert_allclose(logprobs, want[0], 1e-5, 1e-5)
    np.testing.assert_allclose(entropy, want[1], 1e-4, 1e-5)
    alone = target_logprobs(tiny.DECODER, params, hidden, targets, temperature, chunk=chunk)
    np.testing.assert_allclose(alone, logprobs, 1e-6, 1e-6)
    assert logprobs.dtype == jnp.float32


@pytest.mark.parametrize("chunk", [None, 4])
def test_gradient_equals_that_of_whole_logits(params, inputs, chunk):
    hidden, targets = inputs
    weights = np.random.default_rng(1).normal(size=(2, *targets.shape)).astype(np.float32)

    def chunked(params, hidden):
        both = target_logprobs(
            tiny.DECODER, params, hidden, targets, 0.7, entropy=True, chunk=chunk
        )
        return jnp.sum(weights[0] * both[0] + weights[1] * both[1])

    def whole(params, hidden):
        logprobs = jax.nn.log_softmax(hidden @ params["head"]["kernel"] / 0.7)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1)
        return jnp.sum(weights[0] * chosen + weights[1] * entropy)

    got = jax.jit(jax.grad(chunked, (0, 1)))(params, hidden)
    want = jax.grad(whole, (0, 1))(params, hidden)
    np.testing.assert_allclose(got[0]["head"]["kernel"], want[0]["head"]["kernel"], 1e-4, 1e-4)
    np.testing.assert_allclose(got[1], want[1], 1e-4, 1e-4)


def test_no_gradient_flows_through_an_entropy_that_is_only_logged(params, inputs):
    hidden, targets = inputs

    def total(hidden, learned):
        logprobs, entropy = target_logprobs(
            tiny.DECODER, params, hidden, targets, 0.7, entropy=True, entropy_gradient=learned
        )
        return jnp.sum(logprobs) + 3.0 * jnp.sum(entropy)

    def naive_total(hidden):
        logprobs = jax.nn.log_softmax(hidden @ params["head"]["kernel"] / 0.7)
        entropy = jax.lax.stop_gradient(-jnp.sum(jnp.exp(logprobs) * logprobs))
        return jnp.sum(jnp.take_along_axis(logprobs, targets[..., None], -1)) + 3.0 * entropy

    value, gradient = jax.value_and_grad(lambda x: total(x, False))(hidden)
    want, expected = jax.value_and_grad(naive_total)(hidden)
    np.testing.assert_allclose(value, want, 1e-5)
    np.testing.assert_allclose(gradient, expected, 1e-4, 1e-5)
    assert np.abs(jax.grad(lambda x: total(x, True))(hidden) - expected).max() > 1e-2


def test_the_whole_vocabulary_is_never_there_at_once(params):
    """The largest array in the compiled gradient holds one chunk of logits, not all."""
    rows, length, vocab = 2, 64, 512
    model = Decoder(oracle.DECODER.config)
    hidden = jax.ShapeDtypeStruct((rows, length, 64), jnp.float32)
    targets = np.zeros((rows, length), np.int32)

    def loss(params, hidden):
        return jnp.sum(target_logprobs(model, params, hidden, targets, chunk=4))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(model.shapes, hidden).as_text()
    # Rows are laid end to end: 2 rows × 4 positions at a time, of 128.
    assert f"<8x{vocab}xf32>" in text
    flat = rows * length
    for whole in (
        f"{rows}x{length}x{vocab}x",
        f"<{flat}x{vocab}x",
        f"1x{flat}x{vocab}x",
        f"16x8x{vocab}x",
    ):
        assert whole not in text


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_only_wanted_positions_are_read(params, inputs, chunk):
    """Elsewhere results are 0, and not even NaN reaches a gradient."""
    hidden, targets = inputs
    mask = np.random.default_rng(3).random(targets.shape) < 0.4
    mask[1] = False
    spoiled = jnp.where(mask[..., None], hidden, jnp.nan)
    weights = np.random.default_rng(1).normal(size=(2, *targets.shape)).astype(np.float32)

    def masked(params, hidden):
        both = target_logprobs(
            tiny.DECODER, params, hidden, targets, 0.7, entropy=True, mask=mask, chunk=chunk
        )
        return jnp.sum(weights[0] * both[0] + weights[1] * both[1]), both

    def whole(params, hidden):
        logprobs = jax.nn.log_softmax(hidden @ params["head"]["kernel"] / 0.7)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1)
        return jnp.sum(jnp.where(mask, weights[0] * chosen + weights[1] * entropy, 0.0))

    got, both = jax.jit(jax.grad(masked, (0, 1), has_aux=True))(params, spoiled)
    want = jax.grad(whole, (0, 1))(params, hidden)
    exact = naive(params, hidden, targets, 0.7)
    np.testing.assert_allclose(both[0], np.where(mask, exact[0], 0), 1e-5, 1e-5)
    np.testing.assert_allclose(both[1], np.where(mask, exact[1], 0), 1e-4, 1e-5)
    np.testing.assert_allclose(got[0]["head"]["kernel"], want[0]["head"]["kernel"], 1e-4, 1e-4)
    np.testing.assert_allclose(got[1], want[1], 1e-4, 1e-4)
    nothing = target_logprobs(
        tiny.DECODER, params, hidden, targets, mask=np.zeros_like(mask), chunk=chunk
    )
    np.testing.assert_array_equal(nothing, np.zeros(targets.shape))


def test_rows_over_devices_change_nothing(params):
    rng = np.random.default_rng(5)
    hidden = jnp.asarray(rng.normal(size=(8, 12, 32)).astype(np.float32))
    targets = rng.integers(0, tiny.VOCAB, (8, 12))
    mask = rng.random((8, 12)) < 0.5

    def loss(params, hidden):
        logprobs = target_logprobs(tiny.DECODER, params, hidden, targets, mask=mask, chunk=5)
        return jnp.sum(logprobs * jnp.arange(12.0)[None])

    run = jax.value_and_grad(loss, (0, 1))
    want = jax.jit(run)(params, hidden)
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, param_shardings(tiny.DECODER.axes, mesh, tiny.DECODER.shapes))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(placed, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)


def test_targets_of_another_shape_are_refused(params, inputs):
    with pytest.raises(ValueError, match=r"targets \(3, 10\) do not fit hidden \(3, 11, 32\)"):
        target_logprobs(tiny.DECODER, params, inputs[0], inputs[1][:, :-1])


@pytest.mark.parametrize("chunk", [None, 5])
def test_reference_fused_head(shared, chunk):
    """TRL's fused head: loss, log-probabilities, entropy, the gradient of every parameter."""
    vectors = np.load(shared / "oracle/fused_head.npz")
    params = oracle.load(shared / "oracle/policy.safetensors", oracle.DECODER)
    labels = vectors["labels"]
    rows = oracle.rows(vectors["input_ids"], vectors["attention_mask"], labels != -100)
    # These labels are not the inputs.
    targets = np.pad(np.maximum(labels[:, 1:], 0), ((0, 0), (0, 1)))

    def loss(params):
        hidden = oracle.DECODER.apply(params, rows.inputs, rows.positions, rows.segment_ids)
        both = target_logprobs(oracle.DECODER, params, hidden, targets, entropy=True, chunk=chunk)
        kept = jnp.where(rows.loss_mask, both[0], 0.0)
        return -jnp.sum(kept) / rows.loss_mask.sum(), both

    (value, both), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    mask = vectors["label_mask"]
    np.testing.assert_array_equal(rows.loss_mask[:, :-1], mask)
    np.testing.assert_allclose(value, vectors["loss"], 1e-5)
    np.testing.assert_allclose(both[0][:, :-1][mask], vectors["log_probs"][mask], 1e-5, 1e-5)
    np.testing.assert_allclose(both[1][:, :-1][mask], vectors["entropy"][mask], 1e-5, 1e-5)
    names = [name for name in vectors if name.startswith("grad/")]
    want = oracle.tree({name: vectors[name] for name in names}, oracle.DECODER, prefix="grad/")
    for path, leaf in jax.tree_util.tree_leaves_with_path(want):
        got = grads
        for key in path:
            got = got[key.key]
        np.testing.assert_allclose(got, leaf, 1e-5, 1e-6, err_msg=str(path))


class Bare:
    """A model whose hidden states are its logits."""

    def head(self, params):
        return params


def test_reference_selective_log_softmax(shared):
    vectors = np.load(shared / "oracle/selective_log_softmax.npz")
    logits = jnp.asarray(vectors["logits"])
    head = jnp.eye(logits.shape[-1])
    logprobs, entropy = target_logprobs(Bare(), head, logits, vectors["index"], entropy=True)
    np.testing.assert_allclose(logprobs, vectors["logps"], 1e-5)
    np.testing.assert_allclose(entropy, vectors["entropy"], 1e-5)
    cool = target_logprobs(Bare(), head, logits, vectors["index"], 0.7)
    np.testing.assert_allclose(cool, vectors["logps_t07"], 1e-5)


def test_golden_log_softmax():
    """log softmax([0, log 3])[1] = log ¾; at temperature ½, log 9/10."""
    logits = jnp.array([[[0.0, np.log(3.0)]]])
    ones = np.ones((1, 1), np.int32)
    logprob, entropy = target_logprobs(Bare(), jnp.eye(2), logits, ones, entropy=True)
    np.testing.assert_allclose(logprob, [[np.log(0.75)]], 1e-6)
    np.testing.assert_allclose(entropy, [[0.5623351446]], 1e-6)
    np.testing.assert_allclose(
        target_logprobs(Bare(), jnp.eye(2), logits, ones, 0.5), [[np.log(0.9)]], 1e-5
    )


# Scalar heads ------------------------------------------------------------------------------


def test_scalar_head_takes_the_place_of_the_vocabulary(params):
    scorer, scored = with_scalar_head(tiny.DECODER, params, jax.random.key(0))
    assert scorer == Scorer(tiny.DECODER)
    assert set(scored) == {"embed", "blocks", "norm", "score"}
    assert scored["embed"] is params["embed"]
    assert jax.tree.map(lambda x: x.shape, scored) == jax.tree.map(lambda x: x.shape, scorer.shapes)
    assert scorer.axes["score"]["kernel"] == "embed scalar"
    wide = Decoder(oracle.DECODER.config)
    heads = [
        with_scalar_head(wide, {}, jax.random.key(i))[1]["score"]["kernel"] for i in range(100)
    ]
    wanted = 1 / np.sqrt(65)
    # Four standard errors of a standard deviation, σ/√(2n).
    assert abs(np.std(heads) - wanted) < 4 * wanted / np.sqrt(2 * np.size(heads))


def test_a_head_of_several_outputs(params):
    names = ("a", "b", "c")
    scorer, scored = with_scalar_head(tiny.DECODER, params, jax.random.key(0), names)
    assert scored["score"]["kernel"].shape == scorer.shapes["score"]["kernel"].shape == (32, 3)
    hidden = np.random.default_rng(0).normal(size=(2, 4, 32)).astype(np.float32)
    outputs = hidden.astype(np.float64) @ np.asarray(scored["score"]["kernel"], np.float64)
    np.testing.assert_allclose(scorer.outputs(scored, hidden), outputs, 1e-4, 1e-5)
    with pytest.raises(ValueError, match="a, b, c has no single score"):
        scorer.scores(scored, hidden)
    weights = {"a": 2.0, "c": -0.5}
    one, weighed = weigh_attributes(scorer, scored, weights)
    want = 2 * outputs[..., 0] - 0.5 * outputs[..., 2]
    np.testing.assert_allclose(one.scores(weighed, hidden), want, 1e-4, 1e-5)
    assert weighed["embed"] is params["embed"]
    with pytest.raises(ValueError, match=r"attributes=\['a', 'a'\]"):
        Scorer(tiny.DECODER, ("a", "a"))


def test_scalar_head_lies_on_the_models_mesh(params):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    placed = jax.device_put(params, param_shardings(tiny.DECODER.axes, mesh))
    scorer, scored = with_scalar_head(tiny.DECODER, placed, jax.random.key(0))
    state = init_state(scored, make_optimizer())
    want = param_shardings(scorer.axes, mesh, scorer.shapes)
    assert jax.tree.map(lambda x: x.sharding, state.params) == want


def test_scores_are_read_at_the_last_token():
    params = tiny.random_params(tiny.SCORER)
    rng = np.random.default_rng(3)
    documents = [tiny.document(rng, length) for length in (4, 9, 2, 6)]

    def batch(groups, **options):
        return tiny.token_batch(tiny.lay(documents, groups, 15, **options))

    # From the plain numpy model, one document at a time.
    head = np.asarray(params["score"]["kernel"])[:, 0]
    alone = [plain_llama.forward(tiny.CONFIG, params, x["inputs"])[-1] @ head for x in documents]
    run = jax.jit(pooled_scores, static_argnums=(0, 3))
    for left in (False, True):
        got = run(tiny.SCORER, params, batch(tiny.alone(4), left=left))
        np.testing.assert_allclose(got, alone, 1e-4, 1e-5)
    packed = run(tiny.SCORER, params, batch([[1, 0, 2], [3]]), 3)
    assert packed.shape == (2, 3)
    np.testing.assert_allclose(packed[0], [alone[1], alone[0], alone[2]], 1e-4, 1e-5)
    np.testing.assert_allclose(packed[1, 0], alone[3], 1e-4, 1e-5)
    empty = TokenBatch(*(np.zeros((1, 4), np.int32) for _ in TokenBatch._fields))
    assert np.isfinite(run(tiny.SCORER, params, empty)).all()


def test_soft_capped_logits_everywhere_that_they_are_seen(params, inputs):
    """c · tanh(z / c) before the temperature, in numpy."""
    hidden, targets = inputs
    capped = Decoder(dataclasses.replace(tiny.CONFIG, logit_softcap=2.0))
    logits = np.asarray(hidden, np.float64) @ np.asarray(params["head"]["kernel"], np.float64)
    logits = 2 * np.tanh(logits / 2)
    np.testing.assert_allclose(capped.logits(params, hidden), logits, 1e-5, 1e-5)
    scaled = logits / 0.7
    want = np.take_along_axis(scaled, targets[..., None], -1)[..., 0]
    want -= np.log(np.exp(scaled).sum(-1))
    got = target_logprobs(capped, params, hidden, targets, 0.7, chunk=4)
    np.testing.assert_allclose(got, want, 1e-5, 1e-5)
