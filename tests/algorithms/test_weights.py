"""Weights of tokens and pairs, and masks that are no masks: numpy in float64, the same in all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms import dpo, kto, reward, sft
from jaxalign.algorithms.by_source import figures_by_source
from jaxalign.algorithms.loss import Entries
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import make_eval
from jaxalign.types import PairBatch, UnpairedBatch

WEIGHTS = np.array([0.5, 2.0, 0.0, 3.0], np.float32)


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(4)
    return [[tiny.document(rng, n, 3) for n in lengths] for lengths in ((9, 6, 8, 7), (7, 8, 5, 9))]


def lay(side):
    return tiny.token_batch(tiny.lay(side, tiny.alone(4), 9))


@pytest.fixture(scope="module")
def state():
    return init_state(tiny.random_params(tiny.DECODER, 1), optax.sgd(0.0))


def logps(state, document):
    """log π of each trained target, float64."""
    hidden = tiny.DECODER.apply(state.params, document["inputs"][None])
    logits = np.asarray(tiny.DECODER.logits(state.params, hidden), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    at = np.flatnonzero(document["loss_mask"])
    return logp[at, document["targets"][at]]


def loss_of(make, state, batch):
    figures = make_eval(make)(state, batch)
    return {name: float(figure.mean()) for name, figure in figures.items() if "loss/" in name}


def test_weights_of_tokens_in_sft(documents, state):
    rng = np.random.default_rng(1)
    batch = lay(documents[0])
    weights = rng.uniform(0, 2, batch.loss_mask.shape).astype(np.float32)
    weights[~batch.loss_mask] = np.nan  # never read
    total, size = 0.0, 0.0
    for row, document in enumerate(documents[0]):
        own = weights[row, : len(document["inputs"])][document["loss_mask"]].astype(np.float64)
        total, size = total - own @ logps(state, document), size + own.sum()
    got = loss_of(sft.make_loss(tiny.DECODER), state, batch._replace(weights=weights))
    assert got["loss/nll"] == pytest.approx(total / size, rel=1e-5)


def test_a_weight_is_a_factor_of_the_gradient(documents, state):
    """Twice the weight on one row is the row twice."""
    batch = lay(documents[0])
    loss = sft.make_loss(tiny.DECODER)
    weights = np.ones(batch.loss_mask.shape, np.float32)
    weights[1] = 2.0

    def gradient(batch):
        def total(params):
            return loss.terms(params, batch)[0]["nll"] / loss.count(batch)["nll"]

        return jax.grad(total)(state.params)

    once = gradient(batch._replace(weights=weights))
    twice = gradient(jax.tree.map(lambda x: x[jnp.array([0, 1, 2, 3, 1])], batch))
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)


def test_weights_of_pairs(documents, state):
    reference = np.array([[-30.0, -12.0, -40.0, -9.0], [-20.0, -33.0, -31.0, -9.5]], np.float32)
    pairs = PairBatch(*map(lay, documents), *reference, weights=WEIGHTS)
    ratios = [
        [logps(state, d).sum() - r for d, r in zip(side, ref, strict=True)]
        for side, ref in zip(documents, reference, strict=True)
    ]
    losses = np.log1p(np.exp(-0.1 * np.subtract(*ratios)))
    want = (WEIGHTS * losses).sum() / WEIGHTS.sum()
    got = loss_of(dpo.make_loss(tiny.DECODER, dpo.Config(beta=0.1)), state, pairs)
    assert got["loss/preference"] == pytest.approx(want, rel=1e-5)

    scorer = init_state(tiny.random_params(tiny.SCORER, 2), optax.sgd(0.0))
    loss = reward.make_loss(tiny.SCORER)
    each = [
        loss_of(loss, scorer, jax.tree.map(lambda x, i=i: x[i : i + 1], pairs))["loss/preference"]
        for i in (0, 1, 3)
    ]
    want = (WEIGHTS[[0, 1, 3]] * each).sum() / WEIGHTS.sum()
    got = loss_of(loss, scorer, pairs)
    assert got["loss/preference"] == pytest.approx(want, rel=1e-5)


def test_figures_by_source_are_weighted_too():
    entries = Entries(
        "nll", np.float32([1, 2, 4]), np.ones(3, bool), np.array([0, 1, 1]), np.float32([1, 1, 3])
    )
    figures = {n: float(f.mean()) for n, f in figures_by_source(entries, ("a", "b")).items()}
    want = {"nll/a": 1.0, "share/a": 0.2, "nll/b": 3.5, "share/b": 0.8}
    assert figures == pytest.approx(want)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto"])
def test_a_mask_of_floats_is_refused_by_every_algorithm(documents, state, name):
    def floats(tokens):
        return tokens._replace(loss_mask=tokens.loss_mask.astype(np.float32))

    one, two = map(lay, documents)
    rows, flags = np.zeros(4, np.float32), np.ones(4, bool)
    loss, batch = {
        "sft": (sft.make_loss(tiny.DECODER), floats(one)),
        "dpo": (dpo.make_loss(tiny.DECODER), PairBatch(floats(one), floats(two), rows, rows)),
        "reward": (reward.make_loss(tiny.SCORER), PairBatch(floats(one), floats(two))),
        "kto": (
            kto.make_loss(tiny.DECODER),
            UnpairedBatch(floats(one), flags, floats(two), rows, rows),
        ),
    }[name]
    params = tiny.random_params(tiny.SCORER, 2) if name == "reward" else state.params
    with pytest.raises(ValueError, match=r"loss_mask: got float32, wanted bool.*weights"):
        jax.eval_shape(loss.terms, params, batch)


def test_losses_of_answers_refuse_weights_of_tokens(documents, state):
    one, two = map(lay, documents)
    one = one._replace(weights=np.ones(one.loss_mask.shape, np.float32))
    two = two._replace(weights=np.ones(two.loss_mask.shape, np.float32))
    rows = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match=r"TokenBatch\.weights: this loss has no weights"):
        jax.eval_shape(
            dpo.make_loss(tiny.DECODER).terms, state.params, PairBatch(one, two, rows, rows)
        )


def test_every_prepare_takes_the_same_arguments(documents, state):
    """Key, state, reference, batch; those without a use may be left out."""
    pairs = PairBatch(*map(lay, documents))
    prepare = dpo.make_prepare(tiny.DECODER)
    short = prepare(state.params, pairs)
    for got in (
        prepare(None, None, state.params, pairs),
        prepare(ref_params=state.params, batch=pairs),
        prepare(key=None, state=state, ref_params=state.params, batch=pairs),
    ):
        np.testing.assert_array_equal(got.ref_chosen_logps, short.ref_chosen_logps)
    own = dataclasses.replace(prepare, run=lambda *given: given)
    assert own("key", "state", "reference", "batch") == ("reference", "batch")
    kto_prepare = dataclasses.replace(kto.make_prepare(tiny.DECODER), run=lambda *given: given)
    assert kto_prepare("key", "state", "reference", "batch") == ("state", "reference", "batch")
    assert kto_prepare("state", "reference", "batch") == ("state", "reference", "batch")
