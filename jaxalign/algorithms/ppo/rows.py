"""A rollout's rows: prompts with their answers, and the masks over them."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.models.ops import take_columns
from jaxalign.sampling.generate import Generation
from jaxalign.types import Array, PromptBatch, RolloutBatch, TokenBatch


def join_tokens(prompts: PromptBatch, answers: Generation, pad_token: int = 0) -> TokenBatch:
    """Prompts and their answers as rows of P + R tokens, `loss_mask` on the answers' tokens.

    Args:
      prompts: `[B, P]`, padded on the left, one for each answer.
      answers: `[B, R]`.
      pad_token: the target after the last column, which no mask reads.
    """
    outside = jnp.zeros_like(jnp.asarray(prompts.mask))
    # [B, P] and [B, R] -> [B, P + R]
    ids = jnp.concatenate([jnp.asarray(prompts.tokens), answers.tokens], axis=1)
    valid = jnp.concatenate([jnp.asarray(prompts.mask), answers.mask], axis=1)
    answer = jnp.concatenate([outside, answers.mask], axis=1)

    def shift(x: jax.Array, fill: int) -> jax.Array:
        """Moves column t + 1 to column t: targets follow inputs."""
        return jnp.concatenate([x[:, 1:], jnp.full_like(x[:, :1], fill)], axis=1)

    return TokenBatch(
        inputs=ids,
        targets=shift(ids, pad_token),
        positions=jnp.maximum(jnp.cumsum(valid, axis=1) - 1, 0),
        segment_ids=valid.astype(jnp.int32),
        loss_mask=shift(answer, False),
    )


def answer_mask_of(rollout: RolloutBatch) -> Array:
    """The tokens of all answers, whether or not in the loss: `[B, T]`."""
    return rollout.tokens.loss_mask if rollout.answer_mask is None else rollout.answer_mask


def columns_of(rollout: RolloutBatch) -> Array | None:
    """The columns whose hidden states an update reads; None: all."""
    return rollout.columns


@functools.partial(jax.jit, static_argnames="count")
def answer_columns(mask: Array, count: int) -> tuple[jax.Array, jax.Array]:
    """So many columns of each row, from its answer's first on.

    Args:
      mask: bool `[B, T]`, the answers' tokens.
      count: Q, at least one more than an answer has, for a value after it.

    Returns:
      int32 `[B, Q]`, in order; bool scalar, whether they hold all of the mask, and the column after
      each answer if there is one.
    """
    mask = jnp.asarray(mask, bool)
    first = jnp.minimum(jnp.argmax(mask, axis=1), mask.shape[1] - count)  # [B]
    columns = first[:, None].astype(jnp.int32) + jnp.arange(count, dtype=jnp.int32)[None]
    valued = mask.at[:, 1:].set(mask[:, 1:] | mask[:, :-1])
    return columns, jnp.sum(jnp.take_along_axis(valued, columns, axis=1)) == jnp.sum(valued)


def at_columns(rollout: RolloutBatch) -> RolloutBatch:
    """The rollout's per-token arrays at `columns`: `[B, T, …]` → `[B, Q, …]`."""
    columns, shape = rollout.columns, jnp.shape(rollout.advantages)
    if columns is None:
        return rollout

    def take(x: Array) -> Array:
        return take_columns(jnp.asarray(x), columns) if jnp.shape(x)[:2] == shape else x

    own = rollout._replace(columns=None, ptx=None, reward_parts=None)
    return jax.tree.map(take, own)


def without_lower_states(rollout: RolloutBatch) -> RolloutBatch:
    """The rollout without `tokens.lower` and `critic_lower`, by far its largest arrays."""
    return rollout._replace(tokens=rollout.tokens._replace(lower=None), critic_lower=None)


def value_mask_of(rollout: RolloutBatch) -> Array:
    """Where the critic is trained: `[B, T]`."""
    return rollout.tokens.loss_mask if rollout.value_mask is None else rollout.value_mask
