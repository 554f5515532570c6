"""Reward modelling from several answers to a prompt, in an order of preference.

In both losses, answers of equal rank are not compared: neither is pushed above the other. For two
answers of different rank, both are the Bradley–Terry loss.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_bool, as_float32
from jaxalign.losses.reward import bradley_terry
from jaxalign.types import Array


def plackett_luce(scores: Array, ranks: Array, mask: Array) -> jax.Array:
    """Negative log-likelihood of an order, the best answer picked first, then the next best, …

    ℓ = −Σᵢ log( exp rᵢ / (exp rᵢ + Σ_{j worse than i} exp rⱼ) )

    Each answer is picked by Luce's choice rule (Luce 1959, *Individual Choice Behavior*) out of
    itself and all worse answers, which for a full order is Plackett's model (Plackett 1975, *The
    Analysis of Permutations*, https://doi.org/10.2307/2346567); for answers of language models,
    Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3. Answers of equal rank do not compete:
    each is picked out of itself and the worse answers only. (In Breslow's form of Cox's likelihood
    they would compete.)

    Args:
      scores: r, float `[B, K]`.
      ranks: `[B, K]`, larger is better.
      mask: `[B, K]`, which answers exist; other entries are not read.

    Returns:
      float32 `[B]`, ≥ 0, summed over the picks of a prompt; 0 for a prompt without two answers of
      different rank.

    Raises:
      ValueError: shapes differ.

    Two answers with odds of 3 to 1, and a third that does not exist:

    >>> scores, ranks = jnp.log(jnp.array([[3.0, 1.0, 9.0]])), jnp.array([[1.0, 0.0, 2.0]])
    >>> plackett_luce(scores, ranks, jnp.array([[True, True, False]]))  # −log ¾
    Array([0.28768206], dtype=float32)
    """
    scores, ranks, exists = _answers(scores, ranks, mask)
    below = better(ranks, exists)  # [B, K, K]: j is worse than i
    worse = jnp.where(below, scores[:, None, :], -jnp.inf)
    # −log(exp rᵢ / (exp rᵢ + …)) = log(1 + exp(log Σ exp rⱼ − rᵢ)); where no answer is worse, the
    # sum is empty, and the gradient of log 0 is unreliable: so select before the log, not after it.
    some = jnp.any(below, axis=2)
    total = jax.nn.logsumexp(jnp.where(some[:, :, None], worse, 0.0), axis=2)
    return jnp.sum(jnp.where(some, jax.nn.softplus(total - scores), 0.0), axis=1)


def all_pairs(
    scores: Array,
    ranks: Array,
    mask: Array,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """The mean of `losses.reward.bradley_terry` over the pairs that an order implies.

    ℓ = 1/n · Σ_{i better than j} −log σ(rᵢ − rⱼ),  n the number of such pairs

    Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1, where n = C(K, 2): all pairs of a
    prompt are one example of weight 1, since they are not independent. Pairs of equal rank are left
    out of both the sum and n.

    Args:
      scores: r, float `[B, K]`.
      ranks: `[B, K]`, larger is better.
      mask: `[B, K]`, which answers exist; other entries are not read.
      center_coef: see `bradley_terry`.
      label_smoothing: see `bradley_terry`.

    Returns:
      float32 `[B]`, ≥ 0, averaged over the pairs of a prompt; 0 for a prompt without any.

    Raises:
      ValueError: as `bradley_terry`.

    >>> scores, ranks = jnp.log(jnp.array([[3.0, 1.0, 1.0]])), jnp.array([[1.0, 0.0, 0.0]])
    >>> all_pairs(scores, ranks, jnp.ones((1, 3), bool))  # −log ¾, twice, over two
    Array([0.28768206], dtype=float32)
    """
    scores, ranks, exists = _answers(scores, ranks, mask)
    pairs = better(ranks, exists)
    upper = jnp.where(pairs, scores[:, :, None], 0.0)
    lower = jnp.where(pairs, scores[:, None, :], 0.0)
    losses = bradley_terry(upper, lower, center_coef=center_coef, label_smoothing=label_smoothing)
    count = jnp.sum(pairs, axis=(1, 2), dtype=jnp.float32)
    return jnp.sum(jnp.where(pairs, losses, 0.0), axis=(1, 2)) / jnp.maximum(count, 1.0)


def better(ranks: Array, mask: Array) -> jax.Array:
    """Which answer is better than which.

    Args:
      ranks: `[B, K]`, larger is better.
      mask: `[B, K]`, which answers exist.

    Returns:
      bool `[B, K, K]`, True at (i, j) where both exist and i has the larger rank.
    """
    ranks, exists = jnp.asarray(ranks), as_bool(mask)
    both = exists[:, :, None] & exists[:, None, :]
    return both & (ranks[:, :, None] > ranks[:, None, :])


def _answers(scores: Array, ranks: Array, mask: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    scores, ranks, _ = as_float32(scores=scores, ranks=ranks, mask=mask)
    exists = as_bool(mask)
    return jnp.where(exists, scores, 0.0), ranks, exists
