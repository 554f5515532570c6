"""How the reward model and DPO read a pair batch: both sides of a pair in one forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithms.by_source import source_of_sequences
from jaxalign.losses.masked import segment_sum
from jaxalign.losses.tokens import length_desensitised, wpo_weight
from jaxalign.models.base import LanguageModel, read
from jaxalign.models.lm_head import target_logprobs
from jaxalign.types import Array, PairBatch, Params, SharedPairBatch, TokenBatch

Pairs = PairBatch | SharedPairBatch


def interleave(batch: PairBatch) -> TokenBatch:
    """Chosen and rejected as one `[2B, T]` batch: rows c0, r0, c1, r1, …

    Interleaved, not concatenated, so that both sides stay on the device that holds the pair.
    """

    def join(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        both = jnp.stack([chosen, rejected], axis=1)
        return both.reshape(-1, *both.shape[2:])

    return jax.tree.map(join, batch.chosen, batch.rejected)


def separate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undoes `interleave` for an array whose rows are interleaved: (chosen, rejected)."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def pairs_in_row(batch: Pairs) -> int | None:
    """S, the largest number of pairs in a packed row; None where every row is one pair."""
    return None if batch.mask is None else batch.mask.shape[1]


def pair_mask(batch: Pairs) -> jax.Array:
    """Which pairs count: `[B]`, or `[B, S]` if packed. Rows that only fill a batch do not count."""
    if batch.mask is not None:
        return jnp.asarray(batch.mask)
    if isinstance(batch, SharedPairBatch):
        raise ValueError("SharedPairBatch.mask is None: wanted bool [B, S], which pairs exist")
    return jnp.any(batch.chosen.loss_mask, axis=1) & jnp.any(batch.rejected.loss_mask, axis=1)


class Layout(NamedTuple):
    """The rows to run the model on, and where they hold the two sides of each pair.

    Attributes:
      tokens: `[R, T]`.
      sides: int32 `[R, T]`, the side (of a pair in the row) that a token belongs to: 1 … `count`,
        or 0 for none and for a shared prompt.
      count: the largest number of sides in a row.
      split: `[R, count]` → (chosen, rejected), each of the batch's pairs: `[B]` or `[B, S]`.
      join: the inverse of `split`.
    """

    tokens: TokenBatch
    sides: jax.Array
    count: int
    split: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    join: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def answers(self) -> jax.Array:
        """`sides` on the answers, 0 elsewhere."""
        return jnp.where(jnp.asarray(self.tokens.loss_mask), self.sides, 0)

    def sum_answers(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Σ_t x over each answer, for `x` `[R, T]`: (chosen, rejected)."""
        return self.split(segment_sum(x, self.answers, self.count))

    def lengths(self) -> tuple[jax.Array, jax.Array]:
        """Tokens of each answer, float32: (chosen, rejected)."""
        return self.sum_answers(jnp.ones(self.answers.shape))


def layout(batch: Pairs) -> Layout:
    """The `Layout` of a pair batch of any form."""
    if isinstance(batch, SharedPairBatch):
        pairs, tokens = pair_mask(batch).shape[1], batch.tokens
        if tokens.branch_ids is None:
            raise ValueError("SharedPairBatch.tokens has no branch_ids; wanted 0, 1, 2 by token")
        branch, segment = jnp.asarray(tokens.branch_ids), jnp.asarray(tokens.segment_ids)
        # Row by row: chosen and rejected of pair 1, of pair 2, …
        sides = jnp.where((branch > 0) & (segment > 0), 2 * (segment - 1) + branch, 0)

        def split_branches(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            both = x.reshape(x.shape[0], pairs, 2)
            return both[..., 0], both[..., 1]

        def join_branches(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
            return jnp.stack([chosen, rejected], axis=2).reshape(chosen.shape[0], -1)

        return Layout(tokens, sides, 2 * pairs, split_branches, join_branches)

    tokens, pairs = interleave(batch), pairs_in_row(batch)
    segment = jnp.asarray(tokens.segment_ids)

    def join_rows(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        return jnp.stack([chosen, rejected], axis=1).reshape(-1, 1 if pairs is None else pairs)

    if pairs is not None:
        return Layout(tokens, segment, pairs, separate, join_rows)

    def split_rows(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return separate(x[:, 0])

    return Layout(tokens, (segment > 0).astype(jnp.int32), 1, split_rows, join_rows)


def pair_sources(batch: Pairs) -> jax.Array | None:
    """The source of each pair, `[B]` or `[B, S]`; None if not recorded."""
    where = layout(batch)
    source = source_of_sequences(where.tokens, where.sides, where.count)
    return None if source is None else where.split(source)[0]


class Answers(NamedTuple):
    """What a model computes for both answers of each pair; every array is `[B]` or `[B, S]`.

    Attributes:
      chosen: Σ_t log π of the chosen answer in nats, with weight `ld_alpha` on its tail.
      rejected: the same for the rejected answer.
      plain_chosen: Σ_t log π of the chosen answer.
      chosen_lengths: the number of its tokens, float32.
      rejected_lengths: the same for the rejected answer.
      weights: the WPO weight of the pair, or None.
    """

    chosen: jax.Array
    rejected: jax.Array
    plain_chosen: jax.Array
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array
    weights: jax.Array | None


def read_answers(
    model: LanguageModel,
    params: Params,
    batch: Pairs,
    *,
    ld_alpha: float | None = None,
    wpo_weighting: bool = False,
) -> Answers:
    """Runs the model over a pair batch and sums log-probabilities over each answer.

    Args:
      model: a language model.
      params: its parameters.
      batch: pairs, side by side or with shared prompts.
      ld_alpha: see `losses.tokens.length_desensitised`; None: all tokens alike.
      wpo_weighting: compute `weights`.
    """
    hidden, _ = read(model, params, layout(batch).tokens)
    return answers_of(model, params, hidden, batch, ld_alpha=ld_alpha, wpo_weighting=wpo_weighting)


def answers_of(
    model: LanguageModel,
    params: Params,
    hidden: jax.Array,
    batch: Pairs,
    *,
    ld_alpha: float | None = None,
    wpo_weighting: bool = False,
) -> Answers:
    """`read_answers` from the hidden states of the batch's rows.

    Args:
      model: a language model.
      params: its parameters.
      hidden: its hidden states on `layout(batch).tokens`, `[R, T, D]`.
      batch: pairs, side by side or with shared prompts.
      ld_alpha: see `losses.tokens.length_desensitised`; None: all tokens alike.
      wpo_weighting: compute `weights`.
    """
    where = layout(batch)
    tokens = where.tokens
    mask = tokens.loss_mask
    logprobs = target_logprobs(model, params, hidden, tokens.targets, mask=mask)
    plain = where.sum_answers(logprobs)
    lengths = where.lengths()
    logps = plain
    if ld_alpha is not None:
        ranks, shared = _ranks(where), jnp.minimum(*lengths)
        shared = _of_each_token(where.join(shared, shared), where.answers)
        logps = where.sum_answers(length_desensitised(logprobs, ranks, shared, ld_alpha))
    weights = None
    if wpo_weighting:
        # log Σ_v p(v)² = 2 log p(y) − log q(y), where q has doubled logits: this needs no pass over
        # the vocabulary beyond the kind that gives log-probabilities.
        fixed = jax.lax.stop_gradient(hidden)
        doubled = target_logprobs(model, params, fixed, tokens.targets, 0.5, mask=mask)
        squares = where.sum_answers(jax.lax.stop_gradient(2 * logprobs - doubled))
        chosen, rejected = map(wpo_weight, plain, squares, lengths)
        weights = chosen * rejected
    return Answers(*logps, plain[0], *lengths, weights)


def _ranks(where: Layout) -> jax.Array:
    """Each token's index in its answer, from 1; arbitrary values outside the answers."""
    ids = jnp.arange(1, where.count + 1, dtype=jnp.int32)
    member = where.answers[:, :, None] == ids[None, None, :]
    return jnp.sum(jnp.where(member, jnp.cumsum(member, axis=1), 0), axis=2)


def _of_each_token(x: jax.Array, answers: Array) -> jax.Array:
    """`[R, count]` → `[R, T]`: the entry of the token's answer, 0 outside the answers."""
    padded = jnp.pad(x, ((0, 0), (1, 0)))
    return jnp.take_along_axis(padded, answers, axis=1, mode="clip")
