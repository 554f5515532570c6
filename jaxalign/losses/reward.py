"""Reward modelling from pairwise preferences."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.masked import as_float32
from jaxalign.types import Array


def bradley_terry(
    chosen_scores: Array,
    rejected_scores: Array,
    margin: Array | None = None,
    center_coef: float = 0.0,
) -> jax.Array:
    """Negative log-likelihood that the chosen answer wins, with margin and centring.

    ℓ = −log σ(r_c − r_r − m) + c · (r_c + r_r)²

    The first term is Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; the margin m is Touvron et
    al. 2023 (Llama 2, arXiv 2307.09288), eq. 2; the second term, which pins the free offset of
    the scores near 0, is Eisenstein et al. 2023 (arXiv 2312.09244).

    Args:
      chosen_scores: r_c, the scalar head at the end of the chosen answer, `[B]` (any shape).
      rejected_scores: r_r, the same for the rejected answer, the same shape.
      margin: m, how much better chosen is, the same shape; None for 0.
      center_coef: c ≥ 0; 0.01 is usual.

    Returns:
      float32, the shape of the scores, ≥ 0; one loss a pair, not reduced.

    Raises:
      ValueError: shapes differ, or `center_coef` is negative.

    >>> bradley_terry(jnp.array([1.0]), jnp.array([1.0]), center_coef=0.5)
    Array([2.6931472], dtype=float32)
    """
    if not center_coef >= 0:
        raise ValueError(f"center_coef={center_coef}: wanted a number ≥ 0; 0 switches it off")
    if margin is None:
        chosen, rejected = as_float32(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
        gap = chosen - rejected
    else:
        chosen, rejected, margin = as_float32(
            chosen_scores=chosen_scores, rejected_scores=rejected_scores, margin=margin
        )
        gap = chosen - rejected - margin
    return -jax.nn.log_sigmoid(gap) + center_coef * jnp.square(chosen + rejected)
