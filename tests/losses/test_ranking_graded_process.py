"""Rankings, grades and steps: hand values, numpy loops, ties, missing entries, extremes."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.graded import squared_error
from jaxalign.losses.process import solution_score, step_bce
from jaxalign.losses.ranking import all_pairs, better, plackett_luce
from jaxalign.losses.reward import bradley_terry

RNG = np.random.default_rng(3)
SCORES = RNG.normal(size=(6, 4))
# No ties; a tie; a tie and a missing answer; all equal; one answer; none.
RANKS = np.array(
    [[3, 1, 2, 0], [1, 1, 0, 2], [2, 9, 1, 1], [5, 5, 5, 5], [1, 2, 3, 4], [4, 3, 2, 1]], float
)
MASK = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 1, 0], [0] * 4])


def luce_loop(scores, ranks, mask):
    """One answer after the other, in float64."""
    there = [i for i in range(len(scores)) if mask[i]]
    total = 0.0
    for i in there:
        pool = [i] + [j for j in there if ranks[j] < ranks[i]]
        total -= math.log(math.exp(scores[i]) / sum(math.exp(scores[j]) for j in pool))
    return total


def pairs_loop(scores, ranks, mask, center=0.0, smoothing=0.0):
    losses = []
    for i, j in itertools.permutations(range(len(scores)), 2):
        if mask[i] and mask[j] and ranks[i] > ranks[j]:
            p = 1 / (1 + math.exp(scores[j] - scores[i]))
            loss = -(1 - smoothing) * math.log(p) - smoothing * math.log(1 - p)
            losses.append(loss + center * (scores[i] + scores[j]) ** 2)
    return sum(losses) / len(losses) if losses else 0.0


def test_plackett_luce_by_hand():
    # Odds 4 : 2 : 1 : 1, best first: ½ · ½ · ½.
    scores = np.log([[4.0, 2.0, 1.0, 1.0]])
    got = plackett_luce(scores, np.array([[4, 3, 2, 1]]), np.ones((1, 4)))
    np.testing.assert_allclose(got, [3 * np.log(2)], rtol=1e-6)


def test_plackett_luce_is_a_distribution_over_orders():
    """The probabilities of all 24 orders of four answers add up to 1."""
    orders = np.array(list(itertools.permutations(range(4))))
    scores = np.broadcast_to(SCORES[0], orders.shape)
    losses = plackett_luce(scores, orders, np.ones(orders.shape))
    assert float(jnp.sum(jnp.exp(-losses))) == pytest.approx(1, rel=1e-5)


def test_rankings_against_loops():
    luce = [luce_loop(*row) for row in zip(SCORES, RANKS, MASK, strict=True)]
    np.testing.assert_allclose(plackett_luce(SCORES, RANKS, MASK), luce, 1e-5, 1e-6)
    assert luce[3:] == [0, 0, 0]
    pairs = [pairs_loop(*row, 0.1, 0.2) for row in zip(SCORES, RANKS, MASK, strict=True)]
    got = all_pairs(SCORES, RANKS, MASK, center_coef=0.1, label_smoothing=0.2)
    np.testing.assert_allclose(got, pairs, 1e-5, 1e-6)


@pytest.mark.parametrize("loss", [plackett_luce, all_pairs])
def test_two_answers_are_a_pair(loss):
    scores, ranks = SCORES[:, :2], np.array([[1, 0]] * 6)
    want = bradley_terry(scores[:, 0], scores[:, 1])
    np.testing.assert_allclose(loss(scores, ranks, np.ones((6, 2))), want, rtol=1e-5)


@pytest.mark.parametrize("loss", [plackett_luce, all_pairs])
def test_order_of_columns_and_absent_answers_do_not_show(loss):
    order = [2, 0, 3, 1]
    want, want_grad = jax.value_and_grad(lambda s: loss(s, RANKS, MASK).sum())(jnp.asarray(SCORES))
    spoilt = np.where(MASK, SCORES, np.nan)
    turned = np.where(MASK, RANKS, np.nan)[:, order]
    got, grad = jax.value_and_grad(lambda s: loss(s, turned, MASK[:, order]).sum())(
        jnp.asarray(spoilt[:, order])
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(grad, want_grad[:, np.array(order)], 1e-5, 1e-6)
    assert np.all(np.asarray(want_grad)[MASK == 0] == 0)
    # Nothing is said where all are equal, alone, or absent; scores matter by differences only.
    assert np.all(np.asarray(want_grad)[3:] == 0)
    np.testing.assert_allclose(np.sum(want_grad, axis=1), 0, atol=1e-6)


@pytest.mark.parametrize("loss", [plackett_luce, all_pairs])
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_rankings_at_extremes(loss, size):
    scores = jnp.array([[size, 0.0, -size]])
    value, grad = jax.value_and_grad(
        lambda s: loss(s, np.array([[2, 1, 0]]), np.ones((1, 3))).sum()
    )(scores)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    # Upside down: the picks cost 2e4 and 1e4; the three pairs 1e4, 2e4 and 1e4.
    worst = {plackett_luce: 3e4, all_pairs: 4e4 / 3}[loss]
    assert float(value) == pytest.approx(0 if size > 0 else worst)


def test_better_by_hand():
    got = better(np.array([[2, 1, 1, 3]]), np.array([[True, True, True, False]]))
    want = np.zeros((1, 4, 4), bool)
    want[0, 0, 1] = want[0, 0, 2] = True
    np.testing.assert_array_equal(got, want)


def test_ranking_errors():
    with pytest.raises(ValueError, match=r"ranks \(1, 3\)"):
        plackett_luce(np.zeros((1, 2)), np.zeros((1, 3)), np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        all_pairs(np.zeros((1, 2)), np.zeros((1, 2)), np.ones((1, 2)), label_smoothing=0.5)


def test_squared_error_by_hand():
    scores, grades = np.array([[0.5, 4.0]]), np.array([[0.0, 1.0]])
    np.testing.assert_allclose(squared_error(scores, grades), [[0.25, 9.0]])
    grad = jax.grad(lambda s: squared_error(s, grades).sum())(jnp.asarray(scores))
    np.testing.assert_allclose(grad, [[1.0, 6.0]])
    with pytest.raises(ValueError, match=r"grades \(2,\)"):
        squared_error(np.zeros(3), np.zeros(2))


def test_step_bce_against_a_softmax_over_two_classes():
    logits = RNG.normal(size=(5, 2))
    labels = np.array([0, 1, 1, 0, 1])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    want = -np.log(probs[np.arange(5), labels])
    np.testing.assert_allclose(step_bce(logits[:, 1] - logits[:, 0], labels), want, rtol=1e-5)


def test_step_bce_with_soft_labels_and_extremes():
    np.testing.assert_allclose(step_bce(np.zeros(1), np.array([0.3])), [np.log(2)], rtol=1e-6)
    scores = jnp.array([1e4, -1e4, 1e4, -1e4])
    labels = np.array([1.0, 1.0, 0.25, 0.25])
    value, grad = jax.value_and_grad(lambda s: step_bce(s, labels).sum())(scores)
    assert float(value) == pytest.approx(0 + 1e4 + 0.75e4 + 0.25e4)
    np.testing.assert_allclose(grad, [0, -1, 0.75, -0.25], atol=1e-6)


def test_solution_scores_by_hand():
    probs = np.array([[0.9, 0.5, 0.8], [0.1, 0.2, 0.9]])
    scores = np.log(probs / (1 - probs))
    mask = np.array([[True, True, False], [False, False, False]])
    scores[0, 2] = np.nan
    np.testing.assert_allclose(np.exp(solution_score(scores, mask)), [0.45, 1.0], rtol=1e-5)
    np.testing.assert_allclose(np.exp(solution_score(scores, mask, "min")), [0.5, 1.0], rtol=1e-5)
    with pytest.raises(ValueError, match="reduction='mean'"):
        solution_score(scores, mask, "mean")
