"""Advantages without a critic: an answer compared with the other answers to its prompt.

Scores are `[N]`, one per answer, with the `samples` answers to a prompt in adjacent rows (the order
in which `sample` writes them). Nothing here is spread over tokens or whitened.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_bool, as_float32, keep, masked_mean, masked_sum, masked_var
from jaxalign.losses.ppo import gae
from jaxalign.types import Array

SCALES = ("group", "batch", "none")
SCALE_EPS = 1e-4
"""Added to standard deviations, as in TRL: groups that hardly differ are not blown up."""


def rloo(scores: Array, valid: Array, samples: int) -> jax.Array:
    """REINFORCE leave-one-out: each score minus the mean of the other scores in its group.

    A_i = s_i − 1/(G − 1) Σ_{j≠i} s_j: Ahmadian et al. 2024 (arXiv 2402.14740), equation in §3.3;
    Kool et al. 2019. The baseline does not depend on answer i, so the gradient stays unbiased.

    Args:
      scores: s, `[N]`.
      valid: False for rows without an answer, `[N]`; they count nowhere.
      samples: G, the answers per prompt; N is a multiple of it.

    Returns:
      float32 `[N]`; 0 for an answer with no other answer to compare with.

    Raises:
      ValueError: N is not a multiple of `samples`, or shapes that differ.

    >>> rloo(jnp.array([1.0, 2.0, 6.0]), jnp.ones(3, bool), 3)
    Array([-3. , -1.5,  4.5], dtype=float32)
    """
    grouped, mask = _grouped(scores, valid, samples)
    others = jnp.sum(mask, axis=1, keepdims=True) - 1
    rest = masked_sum(grouped, mask, axis=1)[:, None] - grouped
    baseline = rest / jnp.maximum(others, 1)
    return _flat(jnp.where(others > 0, grouped - baseline, 0.0), mask)


def grpo(
    scores: Array, valid: Array, samples: int, *, scale: str = "group", ddof: int = 0
) -> jax.Array:
    """Group-relative advantage: each score against its group's mean and spread.

    A_i = (s_i − mean) / (std + 1e-4): Shao et al. 2024 (arXiv 2402.03300), §4.1.2. `scale="none"`
    returns the numerator alone: Liu et al. 2025 (Dr. GRPO, arXiv 2503.20783), §3.2, find that the
    division favours questions that are too easy or too hard. `scale="batch"` divides by the
    standard deviation of all scores.

    Args:
      scores: s, `[N]`.
      valid: False for rows without an answer, `[N]`; they count nowhere.
      samples: the answers per prompt; N is a multiple of it.
      scale: "group", "batch" or "none".
      ddof: 0 for the biased variance, 1 for the unbiased one (TRL).

    Returns:
      float32 `[N]`; exactly 0 in a group whose scores are all equal.

    Raises:
      ValueError: an unknown `scale`, N is not a multiple of `samples`, or shapes that differ.

    >>> grpo(jnp.array([1.0, 3.0]), jnp.ones(2, bool), 2, scale="none")
    Array([-1.,  1.], dtype=float32)
    """
    check_scale(scale)
    grouped, mask = _grouped(scores, valid, samples)
    centred = grouped - masked_mean(grouped, mask, axis=1)[:, None]
    # The mean of equal numbers may have a rounding error, which the division would amplify.
    centred = jnp.where(_equal(grouped, mask)[:, None], 0.0, centred)
    if scale == "group":
        square = masked_sum(jnp.square(centred), mask, axis=1)
        count = jnp.sum(mask, axis=1) - ddof
        spread = jnp.sqrt(square / jnp.maximum(count, 1))[:, None]
        centred = centred / (spread + SCALE_EPS)
    elif scale == "batch":
        centred = centred / (jnp.sqrt(masked_var(grouped, mask, ddof)) + SCALE_EPS)
    return _flat(centred, mask)


def rewards_to_go(rewards: Array, mask: Array, *, gamma: float = 1.0) -> jax.Array:
    """The sum of a token's reward and all later ones of its answer: REINFORCE's return.

    G_t = Σ_{k≥t} γ^(k−t) r_k. With r_t = −β kl_t and the score at the end this is the advantage of
    REINFORCE++, A_t = s − β Σ_{k≥t} kl_k, before its normalisation over the batch: Hu et al. 2025
    (arXiv 2501.03262), §3.

    Args:
      rewards: r, per token, `[B, T]`.
      mask: True on valid positions, `[B, T]`; other positions are skipped, as in `gae`.
      gamma: γ in [0, 1].

    Returns:
      float32 `[B, T]`, 0 outside the mask.

    >>> rewards_to_go(jnp.array([[1.0, 2.0, 4.0]]), jnp.ones((1, 3), bool), gamma=0.5)
    Array([[3., 4., 4.]], dtype=float32)
    """
    (rewards, _) = as_float32(rewards=rewards, mask=mask)
    return gae(rewards, jnp.zeros_like(rewards), mask, gamma=gamma, lam=1.0)[0]


def equal_groups(scores: Array, valid: Array, samples: int) -> jax.Array:
    """bool `[N]`: all answers of the group have the same score, so there is nothing to learn."""
    grouped, mask = _grouped(scores, valid, samples)
    return jnp.repeat(_equal(grouped, mask), samples)


def check_scale(scale: str) -> None:
    """Raises ValueError for a scale that `grpo` does not know."""
    if scale not in SCALES:
        raise ValueError(f"scale_rewards={scale!r}: wanted one of {', '.join(SCALES)}")


def _grouped(scores: Array, valid: Array, samples: int) -> tuple[jax.Array, jax.Array]:
    scores, mask = keep(scores, valid), as_bool(valid)
    if samples < 1 or scores.ndim != 1 or scores.shape[0] % samples:
        raise ValueError(
            f"scores {scores.shape} with samples={samples}: wanted [N], N a multiple of samples"
        )
    shape = (scores.shape[0] // samples, samples)
    return scores.reshape(shape), mask.reshape(shape)


def _equal(grouped: jax.Array, mask: jax.Array) -> jax.Array:
    top = jnp.max(jnp.where(mask, grouped, -jnp.inf), axis=1)
    return top <= jnp.min(jnp.where(mask, grouped, jnp.inf), axis=1)


def _flat(grouped: jax.Array, mask: jax.Array) -> jax.Array:
    return keep(grouped, mask).reshape(-1)
