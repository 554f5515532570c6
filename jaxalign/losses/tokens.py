"""What preference losses do with an answer's tokens before summing them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_float32
from jaxalign.losses.ranges import outside
from jaxalign.types import Array


def length_desensitised(
    logprobs: Array, ranks: Array, shared_lengths: Array, ld_alpha: float
) -> jax.Array:
    """Log-probabilities with a lower weight beyond the length of the pair's shorter answer.

    Token t's log π has weight 1 for t ≤ l and α beyond, where l is the length of the pair's shorter
    answer: Liu et al. 2024 (LD-DPO, arXiv 2409.06411). It applies to policy and reference. Summed
    over an answer, α = 1 gives DPO's log π, α = 0 cuts to equal lengths.

    Args:
      logprobs: log π of each token in nats, `[B, T]` (any shape).
      ranks: the token's index in its answer, from 1, the same shape.
      shared_lengths: l of the token's pair, the same shape.
      ld_alpha: α in [0, 1].

    Returns:
      float32, the same shape, to be summed over the answer.

    >>> length_desensitised(-jnp.ones(3), jnp.array([1, 2, 3]), jnp.array([2, 2, 2]), 0.5)
    Array([-1. , -1. , -0.5], dtype=float32)
    """
    check_ld_alpha(ld_alpha)
    logprobs, ranks, shared = as_float32(
        logprobs=logprobs, ranks=ranks, shared_lengths=shared_lengths
    )
    return jnp.where(ranks <= shared, 1.0, ld_alpha) * logprobs


def check_ld_alpha(ld_alpha: float) -> None:
    """Raises ValueError for an `ld_alpha` out of range."""
    if outside(ld_alpha, lambda x: 0 <= x <= 1):
        raise ValueError(
            f"ld_alpha={ld_alpha}: wanted 0 ≤ ld_alpha ≤ 1, or None for all tokens alike"
        )


def wpo_weight(logps: Array, log_square_sums: Array, lengths: Array) -> jax.Array:
    """How likely the policy itself would be to write an answer, per token and calibrated.

    w = exp(1/n Σ_t [log π(y_t) − log Σ_v π(v)²]): Zhou et al. 2024 (WPO, arXiv 2406.11827), eq. 2,
    with the "sampled" alignment: an answer drawn from π has a weight of about 1. The loss of a pair
    is multiplied by the weights of both answers; no gradient flows through them.

    Args:
      logps: Σ_t log π(y_t) of an answer in nats, `[B]` (any shape).
      log_square_sums: Σ_t log Σ_v π(v)², the log of the chance that two draws from the policy give
        the same token, summed over the answer, the same shape.
      lengths: n, the answer's number of tokens, the same shape.

    Returns:
      float32, the same shape, > 0; 1 for an answer without tokens.

    >>> wpo_weight(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.array([1]))
    Array([2.], dtype=float32)
    """
    logps, square_sums, lengths = as_float32(
        logps=logps, log_square_sums=log_square_sums, lengths=lengths
    )
    return jnp.exp(jax.lax.stop_gradient((logps - square_sums) / jnp.maximum(lengths, 1.0)))
