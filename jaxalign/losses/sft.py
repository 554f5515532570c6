"""Supervised fine-tuning: maximum likelihood of the answer's tokens, and its DFT variant."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import Array


def nll(target_logprobs: Array) -> jax.Array:
    """Negative log-likelihood per token.

    ℓ_t = −log π(y_t | y_<t). Summed over the answer's tokens and divided by their number in the
    whole batch it is the loss of Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), §3.5.

    Args:
      target_logprobs: log-probability of each target in nats, ≤ 0, `[B, T]` (any shape).

    Returns:
      float32, the same shape, ≥ 0; not reduced and not masked.

    >>> nll(jnp.log(jnp.array([[0.5, 1.0]])))
    Array([[ 0.6931472, -0.       ]], dtype=float32)
    """
    return -jnp.asarray(target_logprobs, jnp.float32)


def dft(target_logprobs: Array) -> jax.Array:
    """Dynamic fine-tuning: the negative log-likelihood, weighted by the token's own probability.

        ℓ_t = −sg(π(y_t | y_<t)) · log π(y_t | y_<t)

    Wu et al. 2025 (arXiv 2508.05629), eq. 9, with sg the stop-gradient. A gradient of `nll` has the
    factor 1/π, which lets unlikely tokens dominate; the weight cancels it.

    Args:
      target_logprobs: log-probability of each target in nats, ≤ 0, `[B, T]` (any shape).

    Returns:
      float32, the same shape, from 0 to 1/e; not reduced and not masked.

    >>> dft(jnp.log(jnp.array([[0.5, 1.0]])))
    Array([[ 0.3465736, -0.       ]], dtype=float32)
    """
    logprobs = jnp.asarray(target_logprobs, jnp.float32)
    return -jax.lax.stop_gradient(jnp.exp(logprobs)) * logprobs
