"""Reward modelling from pairs: the chosen answer should score higher than the rejected one."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_float32
from jaxalign.losses.ranges import outside
from jaxalign.types import Array


def bradley_terry(
    chosen_scores: Array,
    rejected_scores: Array,
    margin: Array | None = None,
    center_coef: float = 0.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Negative log-likelihood that the chosen answer wins, with margin, smoothing and centring.

    ℓ = −(1 − ε) · log σ(d) − ε · log σ(−d) + c · (r_c + r_r)²,  d = r_c − r_r − m

    With ε = 0 the first term is Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; the margin m is
    Touvron et al. 2023 (Llama 2, arXiv 2307.09288), eq. 2; ε, the assumed share of flipped labels,
    is Wang et al. 2024 (arXiv 2401.06080); the last term, which pins the free offset of the scores
    near 0, is Eisenstein et al. 2023 (arXiv 2312.09244).

    Args:
      chosen_scores: r_c, the scalar head at the end of the chosen answer, `[B]` (any shape).
      rejected_scores: r_r, the same for the rejected answer, the same shape.
      margin: m, how much better the chosen answer is, the same shape; None for 0.
      center_coef: c ≥ 0; 0.01 is usual.
      label_smoothing: ε, 0 ≤ ε < ½. With ε > 0 the minimum is at d = log((1 − ε) / ε), not at ∞.

    Returns:
      float32, the shape of the scores, ≥ 0; one loss per pair, not reduced.

    Raises:
      ValueError: shapes differ, `center_coef` is negative, or `label_smoothing` is out of range.

    >>> bradley_terry(jnp.array([1.0]), jnp.array([1.0]), center_coef=0.5)
    Array([2.6931472], dtype=float32)

    At a gap of log 3 the chosen answer wins with probability 3/4:

    >>> bradley_terry(jnp.log(jnp.array([3.0])), jnp.array([0.0]), label_smoothing=0.25)
    Array([0.56233513], dtype=float32)
    """
    if outside(center_coef, lambda x: x >= 0):
        raise ValueError(f"center_coef={center_coef}: wanted a number ≥ 0; 0 switches it off")
    if outside(label_smoothing, lambda x: 0 <= x < 0.5):
        raise ValueError(
            f"label_smoothing={label_smoothing}: wanted a number from 0 to below 0.5; at 0.5 "
            "labels carry no information"
        )
    if margin is None:
        chosen, rejected = as_float32(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
        gap = chosen - rejected
    else:
        chosen, rejected, margin = as_float32(
            chosen_scores=chosen_scores, rejected_scores=rejected_scores, margin=margin
        )
        gap = chosen - rejected - margin
    wins = -jax.nn.log_sigmoid(gap)
    if isinstance(label_smoothing, jax.core.Tracer) or label_smoothing:
        wins = (1 - label_smoothing) * wins - label_smoothing * jax.nn.log_sigmoid(-gap)
    return wins + center_coef * jnp.square(chosen + rejected)
