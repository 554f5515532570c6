"""Kahneman-Tversky optimisation (KTO): single answers, each desirable or not."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_bool, as_float32, masked_mean
from jaxalign.losses.ranges import outside
from jaxalign.types import Array


def kto_loss(
    logps: Array,
    ref_logps: Array,
    desirable: Array,
    kl: Array,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The prospect-theoretic loss of single answers.

    With s = log π(y|x) − log π_ref(y|x) and the reference point z = `kl`: ℓ = λ_D (1 − σ(β(s − z)))
    for a desirable answer, λ_U (1 − σ(β(z − s))) for an undesirable one: Ethayarajh et al. 2024
    (KTO, arXiv 2402.01306), eq. 7, without its constant.

    Args:
      logps: log π of the answers in nats, summed over tokens, `[B]` (any shape).
      ref_logps: log π_ref of the answers. All arrays have the same shape.
      desirable: which answers are desirable.
      kl: z ≥ 0, how far the policy is from the reference (`kl_estimate`), the same number in every
        entry; no gradient flows into it.
      beta: β > 0.
      desirable_weight: λ_D > 0.
      undesirable_weight: λ_U > 0. The paper recommends λ_D n_D / (λ_U n_U) between 1 and 4/3, where
        n_D and n_U count such answers in the data.

    Returns:
      `(losses, rewards)`, float32, the shape of the inputs, not reduced; rewards are β · s.

    >>> none = jnp.zeros(2)
    >>> kto_loss(none, none, jnp.array([True, False]), none, undesirable_weight=2.0)[0]
    Array([0.5, 1. ], dtype=float32)
    """
    check_options(
        beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    logps, ref_logps, _, kl = as_float32(
        logps=logps, ref_logps=ref_logps, desirable=desirable, kl=kl
    )
    good = as_bool(desirable)
    ratio = logps - ref_logps
    gap = beta * (ratio - jax.lax.stop_gradient(kl))
    losses = jnp.where(good, desirable_weight, undesirable_weight) * jax.nn.sigmoid(
        jnp.where(good, -gap, gap)
    )
    return losses, beta * ratio


def kl_estimate(logps: Array, ref_logps: Array, mask: Array) -> jax.Array:
    """How far the policy has moved: max(0, mean of log π − log π_ref) over mismatched answers.

    KTO's reference point z (Ethayarajh et al. 2024, arXiv 2402.01306): the answers belong to
    *other* prompts, which is cheap and biased but keeps the sign of a change. There is one estimate
    for the whole batch, and no gradient flows through it.

    Args:
      logps: log π of each mismatched answer in nats, summed over tokens, `[B]` (any shape).
      ref_logps: log π_ref of them, the same shape.
      mask: which of them exist, the same shape.

    Returns:
      A float32 scalar ≥ 0, in nats.

    >>> kl_estimate(jnp.array([-4.0, -2.0]), jnp.array([-5.0, -2.0]), jnp.array([True, True]))
    Array(0.5, dtype=float32)
    """
    logps, ref_logps = as_float32(logps=logps, ref_logps=ref_logps)
    return jax.nn.relu(jax.lax.stop_gradient(masked_mean(logps - ref_logps, mask)))


def check_options(*, beta: float, desirable_weight: float, undesirable_weight: float) -> None:
    """Raises ValueError for options of `kto_loss` that are out of range."""
    for name, value in (
        ("beta", beta),
        ("desirable_weight", desirable_weight),
        ("undesirable_weight", undesirable_weight),
    ):
        if outside(value, lambda x: x > 0):
            raise ValueError(f"{name}={value}: wanted a number > 0")
