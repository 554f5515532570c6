"""Preference losses that need no reference model.

p = π(y|x) of the answer, n its length in tokens, ε = `label_smoothing`. The rewards are the
quantities that the loss compares, without gradient. They are logged under the same names as DPO's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxalign.losses.forms import sigmoid
from jaxalign.losses.masked import as_float32
from jaxalign.types import Array

Result = tuple[jax.Array, jax.Array, jax.Array]


def simpo(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    chosen_lengths: Array,
    rejected_lengths: Array,
    beta: float = 2.0,
    simpo_gamma: float = 0.5,
    label_smoothing: float = 0.0,
) -> Result:
    """SimPO: an answer's reward is its mean token log-probability; the loss has a margin.

    ℓ = −(1−ε) log σ(r_c − r_r − γ) − ε log σ(−(r_c − r_r − γ)), r = β · log p / n: Meng et al. 2024
    (SimPO, arXiv 2405.14734), eq. 6.

    Args:
      chosen_logps: log p of the chosen answers in nats, summed over tokens, any shape.
      rejected_logps: the same for the rejected ones, the same shape, as all that follow.
      chosen_lengths: n of the chosen answers.
      rejected_lengths: n of the rejected ones.
      beta: β > 0; 2 to 10 is usual, far from DPO's 0.1.
      simpo_gamma: γ ≥ 0, the margin (a constant; published values are 0.3 to 1.6).
      label_smoothing: ε in [0, 0.5).

    Returns:
      `(losses, chosen_rewards, rejected_rewards)`, float32, not reduced.

    >>> two = jnp.array([2.0])
    >>> simpo(-two, -two, chosen_lengths=two, rejected_lengths=two, simpo_gamma=0.0)[0]
    Array([0.6931472], dtype=float32)
    """
    chosen, rejected = _per_token(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    rewards = beta * chosen, beta * rejected
    losses = sigmoid(
        rewards[0] - simpo_gamma, rewards[1], beta=1.0, label_smoothing=label_smoothing
    )
    return losses, *rewards


def orpo(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    chosen_lengths: Array,
    rejected_lengths: Array,
    beta: float = 0.1,
) -> Result:
    """ORPO's odds-ratio term.

    ℓ = −λ log σ(log odds(p̄_c) − log odds(p̄_r)), odds(p) = p / (1 − p), p̄ = p^(1/n): Hong et al.
    2024 (ORPO, arXiv 2403.07691), eq. 7. The whole loss, eq. 6, adds the mean negative
    log-likelihood of the chosen answers: `dpo.Config(loss_type="orpo")` does.

    Args:
      chosen_logps: log p of the chosen answers in nats, summed over tokens, any shape.
      rejected_logps: the same for the rejected ones, the same shape, as all that follow.
      chosen_lengths: n of the chosen answers.
      rejected_lengths: n of the rejected ones.
      beta: λ > 0.

    Returns:
      `(losses, chosen_rewards, rejected_rewards)`, float32, not reduced. Rewards: λ · log p̄.

    >>> two = jnp.array([2.0])
    >>> orpo(-two, -two, chosen_lengths=two, rejected_lengths=two, beta=1.0)[0]
    Array([0.6931472], dtype=float32)
    """
    chosen, rejected = _per_token(chosen_logps, rejected_logps, chosen_lengths, rejected_lengths)
    losses = sigmoid(_log_odds(chosen), _log_odds(rejected), beta=1.0, label_smoothing=0.0)
    return beta * losses, beta * chosen, beta * rejected


def cpo(
    chosen_logps: Array,
    rejected_logps: Array,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Result:
    """CPO's preference term: DPO's loss with a uniform reference.

    ℓ = −(1−ε) log σ(βΔ) − ε log σ(−βΔ), Δ = log p_c − log p_r: Xu et al. 2024 (CPO, arXiv
    2401.08417), eq. 3. The whole loss adds the negative log-likelihood of the chosen
    answers: `dpo.Config(loss_type="cpo")` does.

    Args:
      chosen_logps: log p of the chosen answers in nats, summed over tokens, any shape.
      rejected_logps: the same for the rejected ones, the same shape.
      beta: β > 0.
      label_smoothing: ε in [0, 0.5).

    Returns:
      `(losses, chosen_rewards, rejected_rewards)`, float32, not reduced. Rewards: β · log p.

    >>> cpo(jnp.array([-3.0]), jnp.array([-3.0]))[0]
    Array([0.6931472], dtype=float32)
    """
    chosen, rejected = as_float32(chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    losses = sigmoid(chosen, rejected, beta=beta, label_smoothing=label_smoothing)
    return losses, beta * chosen, beta * rejected


def _per_token(chosen: Array, rejected: Array, n_c: Array, n_r: Array) -> list[jax.Array]:
    chosen, rejected, n_c, n_r = as_float32(
        chosen_logps=chosen, rejected_logps=rejected, chosen_lengths=n_c, rejected_lengths=n_r
    )
    return [chosen / jnp.maximum(n_c, 1.0), rejected / jnp.maximum(n_r, 1.0)]


def _log_odds(logp: jax.Array) -> jax.Array:
    """log p − log(1 − p) from log p; probabilities within 1e-6 of 1 count as 1 − 1e-6."""
    logp = jnp.minimum(logp, -1e-6)
    near = logp > -math.log(2)  # the numerically accurate form of log(1 − p)
    low = jnp.log(-jnp.expm1(jnp.where(near, logp, -1.0)))
    high = jnp.log1p(-jnp.exp(jnp.where(near, -1.0, logp)))
    return logp - jnp.where(near, low, high)
