"""What PPO does with a rollout besides learning: build its rows, cut it up, describe it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.ppo.packing import lay_out, pack_rows, without_answers
from jaxalign.losses.advantages import equal_groups
from jaxalign.losses.masked import masked_mean, masked_sum, masked_var, weighted
from jaxalign.parallel.sharding import all_rows, mesh_of, row_shards, shard_batch
from jaxalign.sampling.generate import Generation
from jaxalign.types import Array, PromptBatch, RolloutBatch, TokenBatch, Weighted


def join_tokens(prompts: PromptBatch, answers: Generation, pad_token: int = 0) -> TokenBatch:
    """Prompts and their answers as rows of P + R tokens, `loss_mask` on the answers' tokens."""
    ids = jnp.concatenate([jnp.asarray(prompts.tokens), answers.tokens], axis=1)
    valid = jnp.concatenate([jnp.asarray(prompts.mask), answers.mask], axis=1)
    answer = jnp.concatenate([jnp.zeros_like(jnp.asarray(prompts.mask)), answers.mask], axis=1)

    def next_one(x: jax.Array, fill: Any) -> jax.Array:
        return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)

    return TokenBatch(
        inputs=ids,
        targets=next_one(ids, pad_token),
        positions=jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0),
        segment_ids=valid.astype(jnp.int32),
        loss_mask=next_one(answer, False),
    )


@jax.jit
def logprob_difference(
    logprobs: Array, sampler_logprobs: Array, mask: Array
) -> tuple[jax.Array, jax.Array]:
    """Mean and largest |trainer − sampler| over the answers' tokens."""
    gap = jnp.abs(logprobs - sampler_logprobs)
    return masked_mean(gap, mask), jnp.max(jnp.where(mask, gap, 0.0))


def minibatches(
    key: jax.Array,
    rollout: RolloutBatch,
    epochs: int = 4,
    count: int = 4,
    *,
    pack: int = 0,
    multiple: int = 1,
) -> Iterator[RolloutBatch]:
    """Cuts a rollout into `epochs × count` mini-batches of whole rows.

    Every epoch uses every row once, in a fresh order drawn from `fold_in(key, epoch)`.

    Args:
      key: PRNG key.
      rollout: B rows.
      epochs: passes over the rollout.
      count: mini-batches an epoch; B must be a multiple.
      pack: 0 leaves an answer a row. n lays the answers of a mini-batch end to end in fewer, longer
        rows (`rollout_packing`), of the smallest of n sizes that takes them: at most so many
        shapes for a step to compile. Losses and gradients are the same; `scores`, `finished` and
        `valid`, which belong to answers and not to rows, are None then.
      multiple: the number of packed rows is a multiple of this (and of the mesh's row shards), for
        steps with as many `micro_batches`.

    Raises:
      ValueError: B is not a multiple of `count`, or a number is out of range.
    """
    rows = rollout.advantages.shape[0]
    if epochs < 1 or count < 1 or pack < 0 or multiple < 1:
        raise ValueError(
            f"epochs={epochs}, count={count}, pack={pack}, multiple={multiple}: wanted positive "
            "integers (pack also 0)"
        )
    if rows % count:
        raise ValueError(f"{rows} rollout rows do not divide into count={count} mini-batches")
    mesh = mesh_of(rollout)
    multiple *= row_shards(mesh) if mesh is not None else 1
    kept = None
    if pack:
        rollout = without_answers(rollout)
        kept = all_rows(rollout.tokens.segment_ids) > 0
    # All orders at once, before the first step is under way: to read one is to wait for the device.
    keys = [jax.random.fold_in(key, epoch) for epoch in range(epochs)]
    for order in jax.device_get([jax.random.permutation(epoch, rows) for epoch in keys]):
        for rows_of_part in np.split(order, count):
            layout = None
            if kept is not None:
                layout = lay_out(kept, rows_of_part.tolist(), sizes=pack, multiple=multiple)
            if layout is None:
                part = _take_rows(rollout, rows_of_part)
            else:
                part = pack_rows(rollout, layout)
            yield part if mesh is None else shard_batch(part, mesh)


@jax.jit
def _take_rows(rollout: RolloutBatch, rows: Array) -> RolloutBatch:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), rollout)


@functools.partial(jax.jit, static_argnames="samples")
def rollout_figures(rollout: RolloutBatch, samples: int = 1) -> dict[str, Weighted]:
    """The means of `rollout_metrics` as sums with their weights.

    Figures add up leaf by leaf over rollouts and are divided once, so that those of held-out data
    do not depend on how the prompts were cut into batches.

    Args:
      rollout: B answers `[B, T]`, as `make_prepare` makes it; on a mesh, those of all hosts.
      samples: answers a prompt; above 1, also `groups/equal`.

    Returns:
      Name → float32 scalars. The weight is the number of answers; of `logprobs/mean_difference`
      the number of their tokens, of `rewards/<name>` the answers that the reward applies to.

    Raises:
      ValueError: the rollout has no scores, rewards or sampler log-probabilities.
    """
    scores, rewards, valid, finished, sampled = _needed(rollout)
    mask = answer_mask_of(rollout)

    def per_answer(x: Array) -> Weighted:
        return weighted(masked_sum(x, mask, axis=1), valid)  # [B, T] -> [B] -> a sum

    # Outside of answers rewards are 0.
    shaped = weighted(jnp.sum(rewards, axis=1), valid)
    entered = scores if rollout.scaled_scores is None else rollout.scaled_scores
    figures = {
        "objective/scores": weighted(scores, valid),
        "objective/kl": per_answer(rollout.old_logprobs - rollout.ref_logprobs),
        "objective/entropy": per_answer(-rollout.old_logprobs),
        "objective/rlhf_reward": shaped,
        "objective/non_score_reward": Weighted(
            shaped.total - weighted(entered, valid).total, shaped.weight
        ),
        "response/length": weighted(jnp.sum(mask, axis=1, dtype=jnp.float32), valid),
        "response/finished": weighted(finished, valid),
        "logprobs/mean_difference": weighted(jnp.abs(rollout.old_logprobs - sampled), mask),
    }
    for name, part in (rollout.reward_parts or {}).items():
        judged = valid if part.applies is None else jnp.logical_and(valid, part.applies)
        figures[f"rewards/{name}"] = weighted(part.values, judged)
        figures[f"applies/{name}"] = weighted(judged, valid)
    if rollout.answer_mask is not None:
        trained = jnp.any(rollout.tokens.loss_mask, axis=1)
        figures["response/trained"] = weighted(trained, valid)
    if samples > 1:
        figures["groups/equal"] = weighted(equal_groups(scores, valid, samples), valid)
    return figures


@functools.partial(jax.jit, static_argnames="samples")
def rollout_metrics(rollout: RolloutBatch, samples: int = 1) -> dict[str, jax.Array]:
    """Describes a rollout before the update: float32 scalars under TRL's names.

    `objective/kl` is the mean over answers of Σ_t (log π − log π_ref); `objective/rlhf_reward` the
    mean of the shaped rewards' sums; `logprobs/*` compare sampler and trainer. With `samples`
    answers a prompt, also the part of the prompts whose answers all score alike. Of several
    rewards, `rewards/<name>` is the mean over the answers that the reward applies to, and
    `applies/<name>` the part of all answers that these are.

    Most are means (`rollout_figures`). Extremes, a standard deviation, a count and the critic's
    explained variance are not, and belong to this rollout alone.
    """
    scores, _, valid, finished, sampled = _needed(rollout)
    mask = answer_mask_of(rollout)
    lengths = jnp.sum(mask, axis=1, dtype=jnp.float32)
    metrics = {name: figure.mean() for name, figure in rollout_figures(rollout, samples).items()}
    metrics |= {
        "objective/scores_std": jnp.sqrt(masked_var(scores, valid)),
        "response/length_min": jnp.min(jnp.where(valid, lengths, jnp.inf), initial=jnp.inf),
        "response/length_max": jnp.max(jnp.where(valid, lengths, 0.0), initial=0.0),
        "val/num_eos_tokens": masked_sum(finished, valid),
        "logprobs/max_difference": logprob_difference(rollout.old_logprobs, sampled, mask)[1],
    }
    if rollout.returns is not None and rollout.old_values is not None:
        critic_mask = value_mask_of(rollout)
        spread = masked_var(rollout.returns, critic_mask)
        unexplained = masked_var(rollout.returns - rollout.old_values, critic_mask)
        explained = jnp.where(spread > 0, 1 - unexplained / spread, 0.0)
        metrics["critic/explained_variance"] = explained
    return metrics


def _needed(rollout: RolloutBatch) -> tuple[Array, Array, Array, Array, Array]:
    """(scores, rewards, valid, finished, sampler log-probabilities) of a complete rollout."""
    scores, rewards, valid = rollout.scores, rollout.rewards, rollout.valid
    finished, sampled = rollout.finished, rollout.sampler_logprobs
    if scores is None or rewards is None or valid is None or finished is None or sampled is None:
        raise ValueError("the rollout lacks scores or rewards; wanted one that make_prepare made")
    return scores, rewards, valid, finished, sampled


def answer_mask_of(rollout: RolloutBatch) -> Array:
    """The tokens of all answers, in the loss or not."""
    return rollout.tokens.loss_mask if rollout.answer_mask is None else rollout.answer_mask


def value_mask_of(rollout: RolloutBatch) -> Array:
    """Where the critic is trained."""
    return rollout.tokens.loss_mask if rollout.value_mask is None else rollout.value_mask
