"""All of TRL 1.16's DPO losses, with divergences, length desensitising, weights and combinations.

`golden/dpo_losses` holds inputs and results of 35 runs of its DPOTrainer's loss on six pairs.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.dpo import preference_loss
from jaxalign.losses.tokens import length_desensitised, wpo_weight

GOLDEN = pathlib.Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "dpo_losses.json").read_text("utf-8"))
with np.load(GOLDEN / "dpo_losses.npz") as file:
    Z = dict(file)
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
PAIRS = 6


def answers(logprobs, case):
    """Sums and lengths of chosen and rejected answers from log-probabilities `[12, 13]`."""
    lengths = Z["mask"].sum(1)
    if case["ld_alpha"] is not None:
        shared = np.tile(np.minimum(lengths[:PAIRS], lengths[PAIRS:]), 2)
        ranks = np.cumsum(Z["mask"], axis=1)
        logprobs = length_desensitised(
            logprobs, ranks, np.broadcast_to(shared[:, None], ranks.shape), case["ld_alpha"]
        )
    sums = jnp.where(Z["mask"], logprobs, 0).sum(1)
    return sums[:PAIRS], sums[PAIRS:], lengths[:PAIRS], lengths[PAIRS:]


def losses(token_logps, case, pairs=slice(None)):
    chosen, rejected, n_c, n_r = (x[pairs] for x in answers(token_logps, case))
    weights = None
    if case["use_weighting"]:
        plain = np.where(Z["mask"], Z["policy_token_logps"], 0).sum(1)
        squares = np.where(Z["mask"], Z["log_sum_sq_probs"], 0).sum(1)
        each = wpo_weight(plain, squares, Z["mask"].sum(1))
        weights = (each[:PAIRS] * each[PAIRS:])[pairs]
    return preference_loss(
        chosen, rejected, Z["ref_chosen_logps"][pairs], Z["ref_rejected_logps"][pairs],
        beta=case["beta"], loss_type=case["loss_type"], loss_weights=case["loss_weights"],
        label_smoothing=case["label_smoothing"], chosen_lengths=n_c, rejected_lengths=n_r,
        f_divergence=case["f"], f_alpha=case["alpha"], discopop_tau=case["tau"],
        pair_weights=weights,
    )  # fmt: skip


def weighted_hinge_gradient(beta):
    """By hand: ∓β · weight / pairs at each token of a pair inside the margin."""
    mask, grad = Z["mask"], np.zeros(Z["mask"].shape)
    each = [
        np.exp((p - q)[m].mean())
        for p, q, m in zip(Z["policy_token_logps"], Z["log_sum_sq_probs"], mask, strict=True)
    ]
    sums = np.where(mask, Z["policy_token_logps"], 0).sum(1)
    ratios = sums - np.concatenate([Z["ref_chosen_logps"], Z["ref_rejected_logps"]])
    for c, r in ((i, i + PAIRS) for i in range(PAIRS)):
        inside = float(beta * (ratios[c] - ratios[r]) < 1)
        grad[c] = -inside * beta * each[c] * each[r] / PAIRS * mask[c]
        grad[r] = inside * beta * each[c] * each[r] / PAIRS * mask[r]
    return grad


@pytest.mark.parametrize("number", range(len(CASES)))
def test_trl(number):
    case = CASES[number]

    def mean(token_logps):
        each, *rewards = losses(token_logps, case)
        return each.mean(), rewards

    token_logps = jnp.asarray(Z["policy_token_logps"])
    (value, rewards), grad = jax.value_and_grad(mean, has_aux=True)(token_logps)
    np.testing.assert_allclose(value, Z["loss"][number], rtol=1e-5)
    # the file's gradient is that of the log-probabilities *after* their masking
    want = np.where(Z["mask"], Z["grad_token_logps"][number], 0)
    if case["use_weighting"] and case["loss_type"] == ["hinge"]:
        # TRL cannot differentiate this one (it multiplies a saved output in place).
        assert np.isnan(want).any()
        want = weighted_hinge_gradient(case["beta"])
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    for got, name in zip(rewards, ("chosen_rewards", "rejected_rewards"), strict=True):
        np.testing.assert_allclose(got, Z[name][number], rtol=1e-5, atol=1e-6)
    chosen, rejected, *_ = answers(token_logps, case)
    margins = rewards[0] - rewards[1]
    metrics = [*rewards, margins > 0, margins, chosen, rejected]
    for got, expected, name in zip(metrics, Z["metrics"][number], METRICS, strict=True):
        np.testing.assert_allclose(got.mean(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_trl_in_batches_of_one(number):
    case = CASES[number]
    got = losses(Z["policy_token_logps"], case)[0]
    if set(case["loss_type"]) & {"aot", "aot_unpaired", "sft"}:  # these look at the whole batch
        got = [
            losses(Z["policy_token_logps"], case, slice(i, i + 1))[0].item() for i in range(PAIRS)
        ]
    # sppo_hard's first pair is a difference of nearly equal numbers in float32
    np.testing.assert_allclose(got, Z["loss_batch1"][number], rtol=1e-5, atol=1e-5)


def test_the_cases_are_those_of_the_reference_files(shared):
    z = np.load(shared / "oracle" / "dpo_losses.npz")
    cases = json.loads((shared / "oracle" / "dpo_losses.json").read_text("utf-8"))
    assert len(cases) == len(CASES) == 35
    np.testing.assert_array_equal(Z["policy_token_logps"], z["policy_token_logps"])
    for number, case in enumerate(cases):
        assert case | CASES[number] == case
        np.testing.assert_array_equal(Z["loss"][number], z[f"{case['case']}/loss"])
