"""Drawing one token a row from logits: temperature, top-k, top-p, all traced.

A token is drawn by inverting the distribution function with two uniform numbers a row, one for a
block of the vocabulary and one for the token in it. Drawing Gumbel noise for every token of the
vocabulary gives the same distribution at many times the cost.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.parallel.sharding import constrain


class Sampling(NamedTuple):
    """How tokens are chosen; all leaves may be traced.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keep the k most likely tokens; 0 keeps all.
      top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
      stop_tokens: int32 `[n]`, ids that end an answer.
      pad_token: id written after the end.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    stop_tokens: Any
    pad_token: Any


def choose(keys: jax.Array, logits: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """One token a row, and its log-probability.

    Args:
      keys: a PRNG key a row, `[B]`: what a row draws does not depend on its neighbours.
      logits: float32 `[B, V]`.
      sampling: how.

    Returns:
      int32 `[B]` and float32 `[B]`: log-probabilities of the whole temperature-scaled distribution,
      filters or not.
    """
    greedy = sampling.temperature <= 0
    scaled = constrain(logits / jnp.where(greedy, 1.0, sampling.temperature), "rows vocab_logits")
    kept = jax.lax.cond(
        (sampling.top_k > 0) | (sampling.top_p < 1), _keep_likely, lambda x, _: x, scaled, sampling
    )
    token = jax.lax.cond(greedy, lambda: _most_likely(scaled), lambda: _draw(keys, kept))
    chosen = jnp.take_along_axis(scaled, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(scaled, axis=-1)


def _most_likely(logits: jax.Array) -> jax.Array:
    """The first index of the largest logit: argmax, which XLA's CPU compiler does not vectorise."""
    size = logits.shape[-1]
    largest = logits == jnp.max(logits, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(largest, jnp.arange(size, dtype=jnp.int32)[None], size), axis=-1)
    return jnp.minimum(first, size - 1)  # no index is that of NaN


def _draw(keys: jax.Array, logits: jax.Array) -> jax.Array:
    """A token of each row with probability softmax(logits): int32 `[B]`."""
    rows, size = logits.shape
    width = 2 ** math.ceil(math.log2(size) / 2)
    blocks = -(-size // width)
    mass = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    mass = jnp.pad(mass, ((0, 0), (0, blocks * width - size))).reshape(rows, blocks, width)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys)
    block = _invert(jnp.sum(mass, axis=-1), uniform[:, 0])
    inside = jnp.take_along_axis(mass, block[:, None, None], axis=1)[:, 0]
    return block * width + _invert(inside, uniform[:, 1])


def _invert(mass: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index at which the running sum of `mass` exceeds `uniform` of its total.

    A uniform number is at most 1 − 2⁻²³, which times the total rounds to less than the total: an
    index of mass 0 is never the answer.
    """
    reached = jnp.cumsum(mass, axis=-1)
    level = uniform[:, None] * reached[:, -1:]
    return jnp.sum(reached <= level, axis=-1, dtype=jnp.int32)


def _keep_likely(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Sets all but the top-k, and then all outside the top-p nucleus, to −∞."""
    size = logits.shape[-1]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    rank = jnp.arange(size)[None]
    k = jnp.where(sampling.top_k > 0, sampling.top_k, size)
    ordered = jnp.where(rank < k, ordered, -jnp.inf)
    probs = jax.nn.softmax(ordered, axis=-1)
    # Probability of all more likely tokens; the most likely one is always kept.
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = (before < sampling.top_p) & (rank < k)
    lowest = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, -jnp.inf)
