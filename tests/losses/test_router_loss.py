"""Load balancing against plain loops and transformers; the document form in every layout."""

import itertools

import numpy as np
import pytest

from jaxalign.losses.router import document_balance, load_balancing

L, N, E, K = 3, 14, 5, 2
LOGITS = np.random.default_rng(3).normal(size=(L, N, E)).astype(np.float32)
MASK = np.arange(N) % 4 != 1


def routing(logits):
    """Probabilities and choices by numpy, `[L, N, E]` each."""
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.zeros_like(probs)
    for index in np.ndindex(probs.shape[:2]):
        chosen[index][np.argsort(-probs[index])[:K]] = 1
    return probs, chosen


def by_hand(logits, kept):
    """E · Σ_i f_i · P_i over the kept tokens, one term at a time."""
    probs, chosen = routing(logits)
    total = 0.0
    for expert in range(E):
        share = np.mean([chosen[i, t, expert] for i in range(L) for t in kept])
        total += share * np.mean([probs[i, t, expert] for i in range(L) for t in kept])
    return E * total


def test_the_loop_equals_transformers():
    """What `by_hand` computes is the published loss: it judges the document form below."""
    torch = pytest.importorskip("torch", reason="the reference is written in torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(torch.tensor(layer) for layer in LOGITS)
    want = load_balancing_loss_func(logits, E, K)
    np.testing.assert_allclose(by_hand(LOGITS, range(N)), want, 1e-5)
    want = load_balancing_loss_func(logits, E, K, torch.tensor(MASK[None]).long())
    np.testing.assert_allclose(by_hand(LOGITS, np.flatnonzero(MASK)), want, 1e-5)


def test_batch_wide():
    np.testing.assert_allclose(load_balancing(LOGITS, K), by_hand(LOGITS, range(N)), 1e-5)
    kept = np.flatnonzero(MASK)
    np.testing.assert_allclose(load_balancing(LOGITS, K, MASK), by_hand(LOGITS, kept), 1e-5)
    # All alike: every expert has the same share, and the loss its least value.
    np.testing.assert_allclose(load_balancing(np.zeros((1, 4, E)), E), E, 1e-6)


def test_batch_wide_equals_transformers():
    torch = pytest.importorskip("torch", reason="the reference is written in torch")
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = tuple(torch.tensor(layer) for layer in LOGITS)
    want = load_balancing_loss_func(logits, E, K)
    np.testing.assert_allclose(load_balancing(LOGITS, K), want, 1e-5)
    want = load_balancing_loss_func(logits, E, K, torch.tensor(MASK[None]).long())
    np.testing.assert_allclose(load_balancing(LOGITS, K, MASK), want, 1e-5)


def test_one_document_is_the_whole_batch():
    probs, chosen = (x.mean(0)[None] for x in routing(LOGITS))
    got = document_balance(probs, chosen, np.ones((1, N), np.int32))
    np.testing.assert_allclose(np.mean(got), by_hand(LOGITS, range(N)), 1e-5)
    # All alike: every expert has the same share, and the loss its least value, k.
    even = np.full((1, 4, E), 1 / E, np.float32)
    got = document_balance(even, np.ones_like(even), np.ones((1, 4), np.int32))
    np.testing.assert_allclose(got, np.full((1, 4), E), 1e-6)


def test_documents_weigh_by_their_tokens_in_every_layout():
    probs, chosen = (x.mean(0) for x in routing(LOGITS))
    sizes = (5, 3, 6)
    starts = np.cumsum((0, *sizes))
    documents = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    want = sum(len(one) * by_hand(LOGITS, one) for one in documents)
    for groups in ([[0, 1, 2]], [[0], [1], [2]], [[2, 0], [1]]):
        rows = np.zeros((3, len(groups), 16, E), np.float32)
        segments = np.zeros((len(groups), 16), np.int32)
        rows[:2] = 7.0  # nonsense on padding
        for row, group in enumerate(groups):
            start = 1
            for number, which in enumerate(group, start=1):
                here = slice(start, start + sizes[which])
                rows[0, row, here] = probs[documents[which]]
                rows[1, row, here] = chosen[documents[which]]
                segments[row, here] = number
                start += sizes[which]
        got = document_balance(rows[0], rows[1], segments)
        assert np.all(np.asarray(got)[segments == 0] == 0)
        np.testing.assert_allclose(np.sum(got), want, 1e-5)
