"""The loss of a preference pair as a function of its two scores: one small function per form.

s_c and s_r are the scores of the chosen and the rejected answer: log-ratios to the reference, or
what `losses.divergence` makes of them, or either per token. Δ = s_c − s_r. All arguments are
float32 arrays of one shape and nothing is reduced. `losses.dpo.preference_loss` calls them: it
passes each form its scores, and checks the options.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

from jaxalign.types import Array

Scores = jax.Array


def sigmoid(chosen: Scores, rejected: Scores, *, beta: float, label_smoothing: float) -> Scores:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ).

    Rafailov et al. 2023 (DPO, arXiv 2305.18290), eq. 7. With ε > 0 it is cDPO: Mitchell 2023, "A
    note on DPO with noisy preferences". On scores per token it is the length-normalised DPO of
    Lambert et al. 2024 (Tülu 3, arXiv 2411.15124).

    >>> sigmoid(jnp.array([2.0]), jnp.array([2.0]), beta=0.1, label_smoothing=0.0)
    Array([0.6931472], dtype=float32)
    """
    logits = beta * (chosen - rejected)
    return -(1 - label_smoothing) * log_sigmoid(logits) - label_smoothing * log_sigmoid(-logits)


def hinge(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """max(0, 1 − βΔ).

    Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), in the form of Liu et al. 2023 (RSO, arXiv
    2309.06657).

    >>> hinge(jnp.array([2.0, 20.0]), jnp.array([0.0, 0.0]), beta=0.1)
    Array([0.8, 0. ], dtype=float32)
    """
    return jax.nn.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """(Δ − 1/(2β))².

    Azar et al. 2023 (IPO, arXiv 2310.12036), eq. 17, with β for its τ.

    >>> ipo(jnp.array([2.0]), jnp.array([0.0]), beta=0.5)
    Array([1.], dtype=float32)
    """
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def robust(chosen: Scores, rejected: Scores, *, beta: float, label_smoothing: float) -> Scores:
    """[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε).

    Chowdhury et al. 2024 (robust DPO, arXiv 2403.00409): the mean over noisy labels is the
    clean loss.

    >>> robust(jnp.array([3.0]), jnp.array([3.0]), beta=0.1, label_smoothing=0.2)
    Array([0.6931472], dtype=float32)
    """
    logits = beta * (chosen - rejected)
    straight = -(1 - label_smoothing) * log_sigmoid(logits)
    return (straight + label_smoothing * log_sigmoid(-logits)) / (1 - 2 * label_smoothing)


def exo_pair(chosen: Scores, rejected: Scores, *, beta: float, label_smoothing: float) -> Scores:
    """σ(βΔ) [log σ(βΔ) − log(1−ε)] + σ(−βΔ) [log σ(−βΔ) − log ε].

    Ji et al. 2024 (EXO, arXiv 2402.00856), eq. 16: KL of the policy's preference from (1−ε, ε).

    >>> exo_pair(jnp.array([0.0]), jnp.array([0.0]), beta=0.1, label_smoothing=0.25)
    Array([0.14384104], dtype=float32)
    """
    logits = beta * (chosen - rejected)
    wins = log_sigmoid(logits) - math.log1p(-label_smoothing)
    loses = log_sigmoid(-logits) - math.log(label_smoothing)
    return jax.nn.sigmoid(logits) * wins + jax.nn.sigmoid(-logits) * loses


def nca_pair(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """−log σ(βs_c) − ½ log σ(−βs_c) − ½ log σ(−βs_r).

    Chen et al. 2024 (NCA, arXiv 2402.05369), for two answers.

    >>> nca_pair(jnp.array([0.0]), jnp.array([0.0]), beta=0.1)
    Array([1.3862944], dtype=float32)
    """
    down = log_sigmoid(-beta * chosen) + log_sigmoid(-beta * rejected)
    return -log_sigmoid(beta * chosen) - 0.5 * down


def bco_pair(
    chosen: Scores, rejected: Scores, *, beta: float, reward_shift: Array | float
) -> Scores:
    """−log σ(βs_c − δ) − log σ(−(βs_r − δ)).

    Jung et al. 2024 (BCO, arXiv 2404.04656), with the reward shift δ.

    >>> bco_pair(jnp.array([5.0]), jnp.array([5.0]), beta=0.1, reward_shift=0.5)
    Array([1.3862944], dtype=float32)
    """
    return -log_sigmoid(beta * chosen - reward_shift) - log_sigmoid(reward_shift - beta * rejected)


def sppo_hard(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """(s_c − 1/(2β))² + (s_r + 1/(2β))².

    Wu et al. 2024 (SPPO, arXiv 2405.00675), eq. 4.7 with win rates 1 and 0.

    >>> sppo_hard(jnp.array([1.0]), jnp.array([-1.0]), beta=0.5)
    Array([0.], dtype=float32)
    """
    target = 1 / (2 * beta)
    return jnp.square(chosen - target) + jnp.square(rejected + target)


def apo_zero(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """1 − σ(βs_c) + σ(βs_r).

    D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq. 7: for chosen answers that are better
    than the model's.

    >>> apo_zero(jnp.array([0.0]), jnp.array([0.0]), beta=0.1)
    Array([1.], dtype=float32)
    """
    return jax.nn.sigmoid(-beta * chosen) + jax.nn.sigmoid(beta * rejected)


def apo_down(chosen: Scores, rejected: Scores, *, beta: float) -> Scores:
    """σ(βs_c) + 1 − σ(βΔ).

    D'Oosterlinck et al. 2024 (APO, arXiv 2408.06266), eq. 8: for chosen answers that are worse
    than the model's.

    >>> apo_down(jnp.array([0.0]), jnp.array([0.0]), beta=0.1)
    Array([1.], dtype=float32)
    """
    return jax.nn.sigmoid(beta * chosen) + jax.nn.sigmoid(-beta * (chosen - rejected))


def discopop(chosen: Scores, rejected: Scores, *, beta: float, discopop_tau: float) -> Scores:
    """(1−m)(−log σ(βΔ)) + m e^(−βΔ), m = σ(βΔ/τ).

    Lu et al. 2024 (DiscoPOP, arXiv 2406.08414), eq. 5.

    >>> discopop(jnp.array([0.0]), jnp.array([0.0]), beta=0.1, discopop_tau=0.05)
    Array([0.8465736], dtype=float32)
    """
    logits = beta * (chosen - rejected)
    logistic = -jax.nn.sigmoid(-logits / discopop_tau) * log_sigmoid(logits)
    # σ(x/τ) e^(−x) as one exponential: for x → −∞ the product tends to 0, but e^(−x) alone is inf.
    return logistic + jnp.exp(log_sigmoid(logits / discopop_tau) - logits)


def transport(
    upper: Scores,
    lower: Scores,
    *,
    beta: float,
    label_smoothing: float,
    mask: jax.Array | None = None,
) -> Scores:
    """−(1−ε) log σ(β(u₍ₖ₎ − l₍ₖ₎)) − ε log σ(−β(u₍ₖ₎ − l₍ₖ₎)), the k-th smallest of each.

    Melnyk et al. 2024 (AOT, arXiv 2406.05882): over a batch, the whole distribution of u should
    dominate that of l. So the k-th smallest u is compared with the k-th smallest l.

    Args:
      upper: u. Paired: log π(y_c) − log π(y_r). Unpaired: log-ratios of the chosen answers.
      lower: l. Paired: log π_ref(y_c) − log π_ref(y_r). Unpaired: those of the rejected ones.
      beta: β.
      label_smoothing: ε.
      mask: which entries exist; None for all. Missing entries are not ranked.

    Returns:
      The shape of the inputs: each entry has the loss of its own u; 0 for missing entries.

    >>> transport(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), beta=0.1, label_smoothing=0.0)
    Array([0.6931472, 0.6931472], dtype=float32)
    """
    shape = upper.shape
    exists = jnp.ones(upper.size, bool) if mask is None else mask.reshape(-1)
    upper, lower = upper.reshape(-1), lower.reshape(-1)

    def order(x: jax.Array) -> jax.Array:
        return jnp.argsort(jnp.where(exists, jax.lax.stop_gradient(x), jnp.inf))

    rank = jnp.argsort(order(upper))  # of each entry among those of `upper`
    partner = lower[order(lower)][rank]
    # Missing entries come last in both orders, so they are paired with each other.
    upper, partner = jnp.where(exists, upper, 0.0), jnp.where(exists, partner, 0.0)
    losses = sigmoid(upper, partner, beta=beta, label_smoothing=label_smoothing)
    return jnp.where(exists, losses, 0.0).reshape(shape)
