"""The reward objectives: metrics and held-out examples by hand, shared prompts, the options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.algorithms import reward
from jaxalign.models.scorer import Scorer
from jaxalign.types import (
    GradedBatch,
    PairBatch,
    RankedBatch,
    SharedPairBatch,
    StepBatch,
    TokenBatch,
    TrainState,
)


class Table:
    """A scorer whose score at a token is looked up: `params[token]`."""

    def apply(self, params, inputs, positions=None, segment_ids=None):
        return jnp.asarray(params)[jnp.asarray(inputs)][..., None]

    def scores(self, params, hidden):
        return hidden[..., 0]


SCORES = np.array([9.0, 0.0, 1.0, 2.0, 3.0], np.float32)


def rows(*texts, sources=None):
    """Rows that end in the tokens given, all of them trained but the first."""
    length = max(map(len, texts))
    ids, segments = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), int)
    for row, text in enumerate(texts):
        ids[row, : len(text)], segments[row, : len(text)] = text, 1
    mask = np.roll(segments, -1, 1) * segments > 0
    known = None if sources is None else np.asarray(sources)[:, None] * np.ones_like(segments)
    return TokenBatch(ids, np.roll(ids, -1, 1), ids, segments, mask, source_ids=known)


def measure(config, batch, scorer=None, params=SCORES):
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, ())
    metrics, examples = reward.make_measure(Table() if scorer is None else scorer, config)(
        state, batch
    )
    means = {name: float(value.mean()) for name, value in metrics.items()}
    return means, jax.device_get(examples)


def test_pairs_by_hand():
    batch = PairBatch(
        rows([1, 4], [2, 1], [], sources=[0, 1, 0]), rows([1, 1], [3, 3], [], sources=[0, 1, 0])
    )
    config = reward.Config(label_smoothing=0.1, center_coef=0.5)
    means, seen = measure(config, batch)
    losses = []
    for chosen, rejected in ((3.0, 0.0), (0.0, 2.0)):
        p = 1 / (1 + np.exp(rejected - chosen))
        losses.append(-0.9 * np.log(p) - 0.1 * np.log(1 - p) + 0.5 * (chosen + rejected) ** 2)
    assert means["loss/preference"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert means["accuracy"] == 0.5
    assert means["margin"] == 0.5
    np.testing.assert_array_equal(seen["mask"], [True, True, False])
    np.testing.assert_array_equal(seen["chosen"], [3, 0, 0])
    np.testing.assert_array_equal(seen["source"][:2], [0, 1])


@pytest.mark.parametrize("kind", reward.RANKINGS)
def test_ranking_by_hand(kind):
    flat = rows([1, 2], [1, 4], [1, 1], [2, 3], [2, 1], [], sources=[0, 0, 0, 1, 1, 1])
    answers = jax.tree.map(lambda x: x.reshape(2, 3, -1), flat)
    mask = np.array([[True, True, True], [True, True, False]])
    batch = RankedBatch(answers, np.array([[2, 1, 1], [1, 0, 9]], np.float32), mask)
    means, seen = measure(reward.Config(objective="ranking", ranking=kind), batch)
    # Scores 1, 3, 0 of ranks 2, 1, 1, and 2, 0 of ranks 1, 0.
    bare = np.exp([1.0, 3.0, 0.0])
    if kind == "plackett_luce":
        first = -np.log(bare[0] / bare.sum())
    else:
        first = (np.log1p(np.exp(2.0)) + np.log1p(np.exp(-1.0))) / 2
    assert means["loss/preference"] == pytest.approx((first + np.log1p(np.exp(-2.0))) / 2, rel=1e-5)
    assert means["accuracy"] == pytest.approx(2 / 3)
    assert means["margin"] == pytest.approx((-2 + 1 + 2) / 3)
    assert means["best"] == 0.5
    np.testing.assert_array_equal(seen["scores"], [[1, 3, 0], [2, 0, 0]])
    np.testing.assert_array_equal(seen["best"], [0, 1])
    np.testing.assert_array_equal(seen["source"], [0, 1])


def test_regression_by_hand():
    scorer = Scorer(tiny.DECODER, ("a", "b"))
    params = tiny.random_params(scorer)
    tokens = rows([5, 6, 7], [8, 9], [])
    batch = GradedBatch(
        tokens,
        np.array([[1, 2], [3, np.nan], [0, 0]], np.float32),
        np.array([[True, True], [True, False], [False, False]]),
    )
    config = reward.Config(objective="regression", attributes=("a", "b"))
    means, seen = measure(config, batch, scorer, params)
    hidden = np.asarray(scorer.apply(params, *tokens[:1], None, tokens.segment_ids))
    ends = np.stack([hidden[0, 2], hidden[1, 1]]) @ np.asarray(params["score"]["kernel"])
    errors = np.array([(ends[0, 0] - 1) ** 2, (ends[1, 0] - 3) ** 2, (ends[0, 1] - 2) ** 2])
    assert means["loss/mse"] == pytest.approx(errors.mean(), rel=1e-4)
    assert means["mse/a"] == pytest.approx(errors[:2].mean(), rel=1e-4)
    assert means["mse/b"] == pytest.approx(errors[2], rel=1e-4)
    np.testing.assert_allclose(seen["scores"][0], ends[0], rtol=1e-4)
    assert seen["scores"][1, 1] == 0


def test_steps_by_hand():
    ends = np.array([[False, True, True], [True, False, False]])
    labels = np.array([[0, 1, 0], [0.25, 0, 0]], np.float32)
    means, seen = measure(
        reward.Config(objective="steps"), StepBatch(rows([1, 3, 4], [2, 1]), labels, ends)
    )
    # Log-odds 2 (right), 3 (wrong), 1 (a quarter).
    losses = [
        np.log1p(np.exp(-2)),
        np.log1p(np.exp(3)),
        0.25 * np.log1p(np.exp(-1)) + 0.75 * np.log1p(np.exp(1)),
    ]
    assert means["loss/steps"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert means["accuracy"] == pytest.approx(1 / 3)
    np.testing.assert_array_equal(seen["scores"], [[0, 2, 3], [1, 0, 0]])


def shared_and_plain():
    """The same pairs in both forms: two in a row, one, and none."""
    rng = np.random.default_rng(2)
    pairs = [
        [rng.integers(3, tiny.VOCAB, size) for size in sizes]
        for sizes in ((4, 3, 5), (3, 6, 2), (1, 2, 2))
    ]
    groups, length = [[0, 1], [2], []], 32
    fields = {name: np.zeros((3, length), np.int32) for name in TokenBatch._fields[:6]}
    for row, group in enumerate(groups):
        at = 0
        for segment, which in enumerate(group, start=1):
            prompt, *sides = pairs[which]
            parts = [(0, prompt[:-1], 0)]
            parts += [
                (n, np.append(prompt[-1:], s), len(prompt) - 1) for n, s in enumerate(sides, 1)
            ]
            for branch, ids, start in parts:
                here = slice(at, at + len(ids))
                fields["inputs"][row, here] = ids
                fields["targets"][row, here] = np.append(ids[1:], 0)
                fields["positions"][row, here] = start + np.arange(len(ids))
                fields["segment_ids"][row, here] = segment
                fields["branch_ids"][row, here] = branch
                fields["loss_mask"][row, here] = (branch > 0) & (np.arange(len(ids)) < len(ids) - 1)
                at += len(ids)
    fields["loss_mask"] = fields["loss_mask"].astype(bool)
    margin = np.array([0.3, 0.7, 0.1], np.float32)
    shared = SharedPairBatch(
        TokenBatch(**fields),
        margin=np.array([[0.3, 0.7], [0.1, 0], [0, 0]], np.float32),
        mask=np.array([[True, True], [True, False], [False, False]]),
    )
    plain = PairBatch(
        *(rows(*(np.append(p[0], p[side]) for p in pairs)) for side in (1, 2)), margin=margin
    )
    positions = [np.cumsum(x.segment_ids, 1) - 1 for x in plain[:2]]
    plain = plain._replace(
        chosen=plain.chosen._replace(positions=positions[0]),
        rejected=plain.rejected._replace(positions=positions[1]),
    )
    return shared, plain


def test_pairs_with_shared_prompts_equal_plain_ones():
    params = tiny.random_params(tiny.SCORER, seed=3)
    loss = reward.make_loss(tiny.SCORER, reward.Config(center_coef=0.1))

    def whole(params, batch):
        sums, metrics = loss.terms(params, batch)
        mean = sums["preference"] / loss.count(batch)["preference"]
        return mean, {name: value.mean() for name, value in metrics.items()}

    run = jax.jit(jax.value_and_grad(whole, has_aux=True))
    (value, metrics), grads = run(params, shared_and_plain()[0])
    (want, want_metrics), want_grads = run(params, shared_and_plain()[1])
    np.testing.assert_allclose(value, want, 1e-5)
    for name, expected in want_metrics.items():
        np.testing.assert_allclose(metrics[name], expected, 1e-5, 1e-6, err_msg=name)
    for got, expected in zip(jax.tree.leaves(grads), jax.tree.leaves(want_grads), strict=True):
        np.testing.assert_allclose(got, expected, 1e-5, 1e-5)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"objective": "pair"}, "objective='pair'"),
        ({"objective": "ranking", "ranking": "borda"}, "ranking='borda'"),
        ({"ranking": "all_pairs"}, "objective=ranking"),
        ({"objective": "ranking", "center_coef": 0.1}, "center_coef=0.1: objective=ranking"),
        ({"objective": "steps", "label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"objective": "regression"}, r"attributes=\[\]"),
        ({"attributes": ("a",)}, r"attributes=\['a'\] with objective=pairs"),
        ({"objective": "regression", "attributes": ("a", "a")}, "each name once"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        reward.Config(**options)


def test_a_head_with_other_attributes_is_refused():
    config = reward.Config(objective="regression", attributes=("a", "b"))
    for scorer in (tiny.SCORER, Scorer(tiny.DECODER, ("b", "a"))):
        with pytest.raises(ValueError, match=r"attributes=\['a', 'b'\]: the scorer has"):
            reward.make_loss(scorer, config)
