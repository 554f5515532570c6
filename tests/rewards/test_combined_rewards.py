"""Weighted sums of rewards, their parts, and rows to which a reward does not apply."""

import jax
import numpy as np
import pytest
from answered import TOK, answered

from jaxalign.algorithms.ppo import rollout_metrics
from jaxalign.rewards import RewardError, combine_rewards, text_reward
from jaxalign.types import RolloutBatch, Scores

ROWS = [{"task": "sum", "worth": 2.0}, {"task": "chat", "worth": 4.0}, {"task": "sum", "worth": 8}]
BATCH = answered([("p", "one"), ("q", "two!"), ("r", "three"), ("", "")])


def worth(prompt, completion, row):
    return row["worth"]


def sums_only(prompt, completion, row):
    return 1.0 if row["task"] == "sum" else None


def lengths(tokens, prompts):
    return jax.numpy.sum(tokens.loss_mask, axis=1)


def test_the_weighted_sum_and_its_parts():
    reward = combine_rewards(
        {
            "worth": text_reward(worth, TOK, rows=ROWS),
            "sums": text_reward(sums_only, TOK, rows=ROWS),
            "length": lengths,  # any function of arrays
        },
        {"worth": 0.5, "sums": -3.0},
    )
    scores = reward(*BATCH)
    assert isinstance(scores, Scores)
    # ½ · worth − 3 · (1 for a sum) + length in tokens, one per byte; 0 in padding rows.
    np.testing.assert_array_equal(scores.values, [1 - 3 + 3, 2 + 4, 4 - 3 + 5, 0])
    np.testing.assert_array_equal(scores.applies, [True, True, True, False])
    assert list(scores.parts) == ["worth", "sums", "length"]
    np.testing.assert_array_equal(scores.parts["sums"].values, [1, 0, 1, 0])
    np.testing.assert_array_equal(scores.parts["sums"].applies, [True, False, True, False])
    np.testing.assert_array_equal(scores.parts["length"].values, [3, 4, 5, 0])


def test_each_mean_is_over_the_answers_that_the_reward_applies_to():
    parts = combine_rewards(
        {
            "worth": text_reward(worth, TOK, rows=ROWS),
            "sums": text_reward(sums_only, TOK, rows=ROWS),
        }
    )(*BATCH).parts
    tokens, _ = BATCH
    zeros = np.zeros(tokens.inputs.shape, np.float32)
    rollout = RolloutBatch(
        tokens,
        *(zeros,) * 5,
        rewards=zeros,
        scores=np.zeros(4, np.float32),
        sampler_logprobs=zeros,
        finished=np.zeros(4, bool),
        valid=np.array([True, True, True, False]),
        reward_parts=parts,
    )
    metrics = rollout_metrics(rollout)
    assert float(metrics["rewards/worth"]) == pytest.approx((2 + 4 + 8) / 3)
    assert float(metrics["rewards/sums"]) == 1.0
    assert float(metrics["applies/worth"]) == 1.0
    assert float(metrics["applies/sums"]) == pytest.approx(2 / 3)


def test_a_weight_of_0_only_logs():
    reward = combine_rewards(
        {"worth": text_reward(worth, TOK, rows=ROWS), "length": lengths}, {"worth": 0}
    )
    scores = reward(*BATCH)
    np.testing.assert_array_equal(scores.values, [3, 4, 5, 0])
    np.testing.assert_array_equal(scores.parts["worth"].values, [2, 4, 8, 0])


def test_answer_without_any_applicable_reward_raises():
    sums = text_reward(sums_only, TOK, rows=ROWS)
    for rewards, weights in (({"sums": sums}, {}), ({"sums": sums, "n": lengths}, {"n": 0.0})):
        with pytest.raises(RewardError, match=r"applies to row 1 of the batch \(row 1 of the data"):
            combine_rewards(rewards, weights)(*BATCH)


def spoilt(value):
    return lambda tokens, prompts: np.array([0.0, value, 0.0, np.nan])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (spoilt(np.nan), r"reward 'bad' gave nan for row 1 of the batch"),
        (spoilt(-np.inf), r"reward 'bad' gave -inf for row 1 of the batch"),
        (lambda tokens, prompts: np.zeros(3), r"reward 'bad' gave shape \(3,\)"),
        (lambda tokens, prompts: 1 / 0, r"reward 'bad' failed: ZeroDivisionError: .* at .*\.py:"),
        (text_reward(lambda p, c: {}["x"], TOK), r"reward 'bad' failed for row 0.*KeyError: 'x'"),
    ],
)
def test_failing_reward_stops_all(reward, message):
    with pytest.raises(RewardError, match=message):
        combine_rewards({"good": lengths, "bad": reward})(*BATCH)
    # Even with weight 0.
    with pytest.raises(RewardError, match=message):
        combine_rewards({"good": lengths, "bad": reward}, {"bad": 0.0})(*BATCH)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"b": 1.0}, "weights of b: no such reward; known: a"),
        ({"a": float("nan")}, "wanted finite numbers"),
        ({"a": 0.0}, "one is not 0"),
    ],
)
def test_invalid_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        combine_rewards({"a": lengths}, weights)
    with pytest.raises(ValueError, match="got none"):
        combine_rewards({})
