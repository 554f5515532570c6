"""Metrics of a rollout before the update: scores, KL, lengths, sampler versus trainer."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.algorithms.ppo.rows import answer_mask_of, value_mask_of
from jaxalign.losses.advantages import equal_groups
from jaxalign.losses.masked import masked_mean, masked_sum, masked_var, weighted
from jaxalign.losses.ppo import kl
from jaxalign.types import Array, RolloutBatch, Weighted


@jax.jit
def logprob_difference(
    logprobs: Array, sampler_logprobs: Array, mask: Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and largest |trainer − sampler| over the answers' tokens."""
    gap = jnp.abs(logprobs - sampler_logprobs)
    return masked_mean(gap, mask), jnp.max(jnp.where(mask, gap, 0.0))


@functools.partial(jax.jit, static_argnames=("samples", "kl_estimator"))
def rollout_figures(
    rollout: RolloutBatch, samples: int = 1, kl_estimator: str = "k1"
) -> dict[str, Weighted]:
    """The means of `rollout_metrics` as sums with their weights.

    The sums add up leaf by leaf over rollouts and are divided once, so that metrics of held-out
    data do not depend on how the prompts were split into batches.

    Args:
      rollout: B answers `[B, T]`, as `make_prepare` makes it; on a mesh, the answers of all hosts.
      samples: answers per prompt; if above 1, `groups/equal` is included.
      kl_estimator: the run's estimator; if not "k1", its KL is `objective/kl_<estimator>`.

    Returns:
      Name → float32 scalars. The weight is the number of answers, except for
      `logprobs/mean_difference` (the number of their tokens) and `rewards/<name>` (the number of
      answers that the reward applies to).

    Raises:
      ValueError: the rollout has no scores or rewards.
    """
    scores, rewards, valid, finished, sampled = _needed(rollout)
    mask = answer_mask_of(rollout)

    def per_answer(x: Array) -> Weighted:
        return weighted(masked_sum(x, mask, axis=1), valid)  # [B, T] -> [B] -> a sum

    # Outside of answers rewards are 0.
    shaped = weighted(jnp.sum(rewards, axis=1), valid)
    figures = {
        "objective/scores": weighted(scores, valid),
        "objective/kl": per_answer(rollout.old_logprobs - rollout.ref_logprobs),
        "objective/entropy": per_answer(-rollout.old_logprobs),
        "objective/rlhf_reward": shaped,
        "objective/non_score_reward": _non_score(rollout, shaped, scores, valid),
        "response/length": weighted(jnp.sum(mask, axis=1, dtype=jnp.float32), valid),
        "response/finished": weighted(finished, valid),
    }
    if sampled is not None:
        difference = jnp.abs(rollout.old_logprobs - sampled)
        figures["logprobs/mean_difference"] = weighted(difference, mask)
    for name, part in (rollout.reward_parts or {}).items():
        judged = valid if part.applies is None else jnp.logical_and(valid, part.applies)
        figures[f"rewards/{name}"] = weighted(part.values, judged)
        figures[f"applies/{name}"] = weighted(judged, valid)
    if rollout.answer_mask is not None:
        trained = jnp.any(rollout.tokens.loss_mask, axis=1)
        figures["response/trained"] = weighted(trained, valid)
    if kl_estimator != "k1":
        estimate = kl(rollout.old_logprobs, rollout.ref_logprobs, kl_estimator)
        figures[f"objective/kl_{kl_estimator}"] = per_answer(estimate)
    if samples > 1:
        figures["groups/equal"] = weighted(equal_groups(scores, valid, samples), valid)
    return figures


def _non_score(rollout: RolloutBatch, shaped: Weighted, scores: Array, valid: Array) -> Weighted:
    if rollout.non_score_rewards is not None:
        return weighted(rollout.non_score_rewards, valid)
    entered = scores if rollout.scaled_scores is None else rollout.scaled_scores
    return Weighted(shaped.total - weighted(entered, valid).total, shaped.weight)


@functools.partial(jax.jit, static_argnames=("samples", "kl_estimator"))
def rollout_metrics(
    rollout: RolloutBatch, samples: int = 1, kl_estimator: str = "k1"
) -> dict[str, jax.Array]:
    """Describes a rollout before the update: float32 scalars under TRL's names.

    `objective/kl` is the mean over answers of Σ_t (log π − log π_ref), whichever estimator the run
    uses; the KL of another `kl_estimator` is logged as well. `objective/rlhf_reward` is the mean of
    the shaped rewards' sums; `logprobs/*` compare sampler and trainer. With several `samples` per
    prompt, `groups/equal` is the fraction of prompts whose answers all have the same score. With
    several rewards, `rewards/<name>` is the mean over the answers that the reward applies to, and
    `applies/<name>` is their fraction of all answers.

    Most are means (`rollout_figures`). The extremes, a standard deviation, a count and the critic's
    explained variance are not, and describe this rollout alone.
    """
    scores, _, valid, finished, sampled = _needed(rollout)
    mask = answer_mask_of(rollout)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    metrics = {
        name: figure.mean()
        for name, figure in rollout_figures(rollout, samples, kl_estimator).items()
    }
    metrics |= {
        "objective/scores_std": jnp.sqrt(masked_var(scores, valid)),
        "response/length_min": jnp.min(jnp.where(valid, lengths, jnp.inf), initial=jnp.inf),
        "response/length_max": jnp.max(jnp.where(valid, lengths, 0.0), initial=0.0),
        "val/num_eos_tokens": masked_sum(finished, valid),
    }
    if sampled is not None:
        largest = logprob_difference(rollout.old_logprobs, sampled, mask)[1]
        metrics["logprobs/max_difference"] = largest
    if rollout.returns is not None and rollout.old_values is not None:
        critic_mask = value_mask_of(rollout)
        spread = masked_var(rollout.returns, critic_mask)
        unexplained = masked_var(rollout.returns - rollout.old_values, critic_mask)
        explained = jnp.where(spread > 0, 1 - unexplained / spread, 0.0)
        metrics["critic/explained_variance"] = explained
    return metrics


def _needed(rollout: RolloutBatch) -> tuple[Array, Array, Array, Array, Array | None]:
    """(scores, rewards, valid, finished, sampler log-probabilities or None) of a whole rollout."""
    scores, rewards, valid = rollout.scores, rollout.rewards, rollout.valid
    finished, sampled = rollout.finished, rollout.sampler_logprobs
    if scores is None or rewards is None or valid is None or finished is None:
        raise ValueError("the rollout lacks scores or rewards; wanted one that make_prepare made")
    return scores, rewards, valid, finished, sampled
