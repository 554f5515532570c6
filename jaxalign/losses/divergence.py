"""f-divergences for preference losses: what replaces the log-ratio.

DPO penalises the reverse KL to the reference. Wang et al. 2023 (f-DPO, arXiv 2309.16240) put any
f-divergence D_f(π ‖ π_ref) there: with t = π(y|x) / π_ref(y|x), the log-ratio s = log t of each
answer becomes f′(t), and a loss on the difference of the two is otherwise unchanged. The term
common to all answers cancels only in that difference, so losses on a single answer cannot use
f-divergences.

| `f_divergence` | f′(t) |
| --- | --- |
| reverse_kl | s |
| forward_kl | 1 − e^(−s) |
| js_divergence | log 2 + log σ(s) |
| alpha_divergence | (e^((α−1)s) − 1) / (α − 1); α → 1: reverse KL; α = 0: forward KL |
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxalign.losses.exponential import linear_expm1
from jaxalign.losses.ranges import outside
from jaxalign.types import Array

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""The divergences that `divergence_score` knows."""

LINEAR_FROM = 30.0
"""Exponents above it are continued along the tangent."""


def divergence_score(
    log_ratio: Array, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> jax.Array:
    """f′(π/π_ref) of each answer, as a function of its log-ratio.

    Wang et al. 2023 (arXiv 2309.16240), table 1; the table at the top of this file. Where an
    exponent passes `LINEAR_FROM`, the exponential continues along its tangent. Squares and
    gradients of the result then stay finite for log-ratios of ±10⁴ and still pull the policy back.
    (TRL clips α's exponent at 80 and lets the forward KL overflow.)

    Args:
      log_ratio: s = log π − log π_ref in nats, any shape.
      f_divergence: one of `F_DIVERGENCES`.
      f_alpha: α, for `alpha_divergence` only.

    Returns:
      float32, the shape of `log_ratio`; rising in s, 0 at s = 0.

    Raises:
      ValueError: an unknown divergence, or an α that it does not use.

    >>> divergence_score(jnp.array([1.0, 2.0]), "js_divergence")
    Array([0.3798855, 0.5662192], dtype=float32)
    """
    check_divergence(f_divergence, f_alpha)
    ratio = jnp.asarray(log_ratio, jnp.float32)
    if f_divergence == "js_divergence":
        return math.log(2) + jax.nn.log_sigmoid(ratio)
    power = {"forward_kl": -1.0, "alpha_divergence": f_alpha - 1.0}.get(f_divergence, 0.0)
    if isinstance(power, jax.core.Tracer):
        small = jnp.abs(power) < 1e-6
        power = jnp.where(small, 1.0, power)
        return jnp.where(small, ratio, linear_expm1(power * ratio, LINEAR_FROM) / power)
    if abs(power) < 1e-6:
        return ratio
    return linear_expm1(power * ratio, LINEAR_FROM) / power


def check_divergence(f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> None:
    """Raises ValueError for an unknown divergence, or an α without effect."""
    if f_divergence not in F_DIVERGENCES:
        raise ValueError(f"f_divergence={f_divergence!r}: wanted one of {', '.join(F_DIVERGENCES)}")
    if outside(f_alpha, lambda x: x == 0.5) and f_divergence != "alpha_divergence":
        raise ValueError(
            f"f_alpha={f_alpha} has no effect on f_divergence={f_divergence!r}; leave it 0.5, or "
            "use f_divergence='alpha_divergence'"
        )
    if outside(f_alpha, math.isfinite):
        raise ValueError(f"f_alpha={f_alpha}: wanted a finite number; 0.5 is usual")
