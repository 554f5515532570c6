"""Advantages of groups and averages of tokens: hand values, numpy loops, TRL's formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.losses import advantages, aggregate
from jaxalign.losses.masked import run_counts, run_sum

SCORES = np.array([1.0, 2.0, 6.0, 0.5, 0.5, 0.5, 3.0, np.nan, 5.0], np.float32)
VALID = np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], bool)  # the third group lacks one answer


def test_leave_one_out_by_a_loop():
    want = np.zeros(9)
    for i in range(9):
        group = [j for j in range(i // 3 * 3, i // 3 * 3 + 3) if VALID[j]]
        others = [SCORES[j] for j in group if j != i]
        want[i] = SCORES[i] - np.mean(others) if VALID[i] else 0.0
    got = advantages.rloo(SCORES, VALID, 3)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(got[:3], [-3, -1.5, 4.5])
    assert np.asarray(advantages.rloo(SCORES[:2], np.array([True, False]), 2)).tolist() == [0, 0]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_by_a_loop(scale, ddof):
    """As TRL's GRPOTrainer: (r − mean) / (std + 1e-4), with ddof 1 its torch.std."""
    want = np.zeros(9)
    for i in np.flatnonzero(VALID):
        group = [SCORES[j] for j in range(i // 3 * 3, i // 3 * 3 + 3) if VALID[j]]
        spread = {"group": np.std(group, ddof=ddof), "batch": SCORES[VALID].std(ddof=ddof)}
        divisor = spread[scale] + 1e-4 if scale != "none" else 1.0
        want[i] = (SCORES[i] - np.mean(group)) / divisor
    got = advantages.grpo(SCORES, VALID, 3, scale=scale, ddof=ddof)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert np.asarray(got)[3:6].tolist() == [0, 0, 0]


def test_equal_scores_give_no_advantage_to_the_last_bit():
    # 0.1 has no exact mean in float32; a spread of rounding must not become an advantage.
    scores = np.full(7, 0.1, np.float32)
    assert not np.asarray(advantages.grpo(scores, np.ones(7, bool), 7)).any()
    equal = advantages.equal_groups(SCORES, VALID, 3)
    np.testing.assert_array_equal(equal, [False] * 3 + [True] * 3 + [False] * 3)


def test_rewards_to_go_by_a_loop():
    rng = np.random.default_rng(0)
    mask = np.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
    rewards = np.where(mask, rng.normal(size=mask.shape), np.nan)
    want = np.zeros(mask.shape)
    for b in range(3):
        at = np.flatnonzero(mask[b])
        for i, t in enumerate(at):
            want[b, t] = sum(0.9**k * rewards[b, u] for k, u in enumerate(at[i:]))
    np.testing.assert_allclose(advantages.rewards_to_go(rewards, mask, gamma=0.9), want, 1e-5)


def test_errors():
    with pytest.raises(ValueError, match=r"scores \(9,\) with samples=2"):
        advantages.rloo(SCORES, VALID, 2)
    with pytest.raises(ValueError, match="scale_rewards='row': wanted one of group"):
        advantages.grpo(SCORES, VALID, 3, scale="row")
    with pytest.raises(ValueError, match="loss_aggregation='mean': wanted one of token"):
        aggregate.check_aggregation("mean")


# Averages: four documents, padded a row each, and packed into two rows.

LENGTHS = (5, 9, 3, 7)
LAYOUTS = {
    "padded": ([[0], [1], [2], [3]], 9, False),
    "left": ([[3], [], [1], [0], [2]], 12, True),
    "packed": ([[1, 2, 0], [], [3]], 18, False),
}


def laid(layout):
    rng = np.random.default_rng(1)
    documents = [tiny.document(rng, length, prompt=2) for length in LENGTHS]
    documents[2]["loss_mask"][:] = False  # an answer that left the loss
    documents[1]["loss_mask"][4] = False  # and one with a gap
    for one in documents:
        one["values"] = rng.normal(size=len(one["inputs"])).astype(np.float32)
    groups, length, left = LAYOUTS[layout]
    rows = tiny.lay(documents, groups, length, left=left)
    values = np.where(rows["loss_mask"], rows["values"], np.nan)
    return tiny.token_batch(rows), values, documents


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averages_are_those_of_the_papers_in_every_layout(layout):
    tokens, values, documents = laid(layout)
    answers = [one["values"][one["loss_mask"]] for one in documents if one["loss_mask"].any()]
    want = {
        "token": np.concatenate(answers).mean(),
        "sequence": np.mean([answer.mean() for answer in answers]),
        "constant": sum(answer.sum() for answer in answers) / (len(answers) * 16),
    }
    assert len({round(float(x), 4) for x in want.values()}) == 3
    for how, value in want.items():
        got = aggregate.aggregate(values, tokens, how, 16)
        np.testing.assert_allclose(got.mean(), value, rtol=1e-5)
        assert got.weight == aggregate.aggregate_weight(tokens, how, 16)
    assert aggregate.aggregate_weight(tokens, "sequence", 16) == 3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_of_an_answer_stands_at_each_of_its_tokens(layout):
    tokens, values, documents = laid(layout)
    got = np.asarray(aggregate.answer_mean(values, tokens))
    assert not got[~tokens.loss_mask].any()
    want = sorted(np.mean(x["values"][x["loss_mask"]]) for x in documents if x["loss_mask"].any())
    np.testing.assert_allclose(np.unique(got[tokens.loss_mask].round(5)), want, atol=2e-5)


def test_running_sums_keep_documents_and_branches_apart():
    ids = jnp.array([[0, 1, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3]])
    branches = jnp.array([[0, 0, 1, 1, 0, 0], [0, 0, 1, 1, 2, 2]])
    x = jnp.array([[9.0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])
    np.testing.assert_allclose(run_sum(x, ids), [[9, 6, 6, 6, 9, 9], [21] * 6])
    want = [[9, 1, 5, 5, 9, 9], [3, 3, 7, 7, 11, 11]]
    np.testing.assert_allclose(run_sum(x, ids, branches), want)
    np.testing.assert_allclose(run_counts(x > 2, ids), [[1, 0, 0, 1, 1, 2], [0, 0, 1, 2, 3, 4]])
    grad = jax.grad(lambda x: jnp.sum(run_sum(x, ids)[:, 1]))(x)
    np.testing.assert_allclose(grad, [[0, 1, 1, 1, 0, 0], [1] * 6])
