"""Samples one token per row from logits: temperature, top-k and top-p, all traced.

Sampling inverts the cumulative distribution with two uniform numbers per row: one selects a block
of about √V tokens, the other the token in it. Gumbel noise for every token gives the same
distribution, but needs `[B, V]` random numbers, which on a CPU cost many times the rest. This was
not measured on accelerators.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.exp_sum import ExpSum
from jaxalign.parallel.sharding import constrain


class Sampling(NamedTuple):
    """How tokens are sampled; all leaves may be traced.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the smallest set of tokens with at least this probability; 1: all.
      stop_tokens: int32 `[n]`, ids that end an answer.
      pad_token: id written after the end.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    stop_tokens: Any
    pad_token: Any


def answer_keys(key: jax.Array, answers: jax.Array) -> jax.Array:
    """The keys of answers, int32 `[S]` → keys `[S]`.

    Args:
      key: one key, folded with each answer's number; or the keys of all answers, `[N]`.
      answers: their numbers.
    """
    return key[answers] if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, answers)


def sample_tokens(
    keys: jax.Array, logits: jax.Array, sampling: Sampling
) -> tuple[jax.Array, jax.Array]:
    """Samples one token per row, with its log-probability.

    Args:
      keys: one PRNG key per row, `[B]`, so that a row's token does not depend on other rows.
      logits: float32 `[B, V]`.
      sampling: temperature and filters.

    Returns:
      Tokens int32 `[B]`, and their log-probabilities float32 `[B]` under the temperature-scaled
      distribution over the whole vocabulary, with or without filters.
    """
    greedy = sampling.temperature <= 0
    # Shift the largest to 0 before the division: float32 keeps few decimals of large numbers.
    shifted = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled = constrain(shifted / jnp.where(greedy, 1.0, sampling.temperature), "rows vocab_logits")
    mass = _mass(scaled)
    filters = (sampling.top_k > 0) | (sampling.top_p < 1)
    token = jax.lax.cond(
        greedy,
        lambda: _most_likely(scaled),
        lambda: jax.lax.cond(
            filters,
            lambda: _sample(keys, _mass(_filter(scaled, sampling))),
            lambda: _sample(keys, mass),
        ),
    )
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
    # The token apart from the others, as in the vocabulary head: the logarithm keeps its digits.
    return token, chosen - ExpSum(jnp.exp(chosen), _others(mass, token)).log()


def _most_likely(logits: jax.Array) -> jax.Array:
    """The first index of the largest logit, `[B, V]` → `[B]`.

    `jnp.argmax` gives the same, but XLA's CPU compiler does not vectorise it.
    """
    size = logits.shape[-1]
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(largest, jnp.arange(size, dtype=jnp.int32)[None], size), axis=-1)
    return jnp.minimum(first, size - 1)  # a row of NaN has no largest logit


class Mass(NamedTuple):
    """exp(z) of all tokens, in N blocks of W tokens, √V to 2√V.

    Attributes:
      tokens: `[B, N, W]`, 0 beyond the vocabulary.
      blocks: `[B, N]`, the sum of each block.
    """

    tokens: jax.Array
    blocks: jax.Array


def _mass(logits: jax.Array) -> Mass:
    """Of logits `[B, V]`, whose largest in a row is 0; no filter removes it."""
    rows, size = logits.shape
    width = 2 ** math.ceil(math.log2(size) / 2)
    blocks = -(-size // width)
    mass = jnp.pad(jnp.exp(logits), ((0, 0), (0, blocks * width - size)))
    mass = mass.reshape(rows, blocks, width)
    return Mass(mass, jnp.sum(mass, axis=-1))


def _sample(keys: jax.Array, mass: Mass) -> jax.Array:
    """Samples a token per row in proportion to its mass: int32 `[B]`."""
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)  # [B, 2]
    block = _invert(mass.blocks, uniform[:, 0])  # [B]
    in_block = jnp.take_along_axis(mass.tokens, block[:, None, None], axis=1)[:, 0]  # [B, W]
    return block * mass.tokens.shape[2] + _invert(in_block, uniform[:, 1])


def _others(mass: Mass, token: jax.Array) -> jax.Array:
    """The mass of all tokens but one, `[B]`: the other blocks, and the others of its block."""
    _, blocks, width = mass.tokens.shape
    block, place = token // width, token % width
    in_block = jnp.take_along_axis(mass.tokens, block[:, None, None], axis=1)[:, 0]  # [B, W]
    beside = jnp.where(jnp.arange(width)[None] == place[:, None], 0.0, in_block)
    elsewhere = jnp.where(jnp.arange(blocks)[None] == block[:, None], 0.0, mass.blocks)
    return jnp.sum(beside, axis=-1) + jnp.sum(elsewhere, axis=-1)


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the cumulative sum of `mass` exceeds `uniform` of its total.

    A uniform number is at most 1 − 2⁻²³. Times the total it rounds to less than the total, so that
    an index of mass 0 is never returned.
    """
    cumulative = jnp.cumsum(mass, axis=-1)  # [B, n]
    level = uniform[:, None] * cumulative[:, -1:]
    return jnp.sum(cumulative <= level, axis=-1, dtype=jnp.int32)


def _filter(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets all but the top-k, and then all outside the top-p nucleus, to −∞: `[B, V]`."""
    size = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(size)[None]
    k = jnp.where(sampling.top_k > 0, sampling.top_k, size)
    ordered = jnp.where(rank < k, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    # Probability of all more likely tokens: 0 for the most likely one, which therefore stays.
    before = jnp.cumsum(probs, axis=-1) - probs
    in_nucleus = (before < sampling.top_p) & (rank < k)
    lowest = jnp.min(jnp.where(in_nucleus, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
