"""Proximal policy optimization for language models: rewards, advantages and the two losses.

A token is an action. Per-token arrays are `[B, T]` and aligned with the targets of a row (see
`RolloutBatch`); prompt and answer share the row and a mask marks the answer's tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.exponential import linear_expm1
from jaxalign.losses.masked import as_bool, as_float32, keep
from jaxalign.losses.ranges import outside
from jaxalign.types import Array

MAX_LOG_RATIO = 20.0
"""Log-ratios are clipped to ± this before `exp`: e²⁰ ≈ 5e8 is far outside every clip range."""

KL_ESTIMATORS = ("k1", "k2", "k3")
SCORE_POSITIONS = ("eos", "after_eos")


def kl(logprobs: Array, ref_logprobs: Array, estimator: str = "k1") -> jax.Array:
    """Per-token estimate of KL(π‖π_ref) from one sample of π.

    With d = log π − log π_ref: k1 = d (unbiased, either sign), k2 = d²/2 (biased, ≥ 0), k3 = e^(−d)
    − 1 + d (unbiased, ≥ 0). Schulman 2020, "Approximating KL divergence". Where d < −20, k3
    continues along its tangent, whose slope of about e²⁰ still pulls the policy back.

    Args:
      logprobs: log π of the sampled tokens, `[B, T]` (any shape).
      ref_logprobs: log π_ref of the same tokens, the same shape.
      estimator: "k1", "k2" or "k3".

    Returns:
      float32, the same shape, in nats; not reduced and not masked.

    Raises:
      ValueError: an unknown estimator, or shapes that differ.

    >>> kl(jnp.array([-1.0]), jnp.array([-3.0]), "k2")
    Array([2.], dtype=float32)
    """
    check_kl_estimator(estimator)
    new, ref = as_float32(logprobs=logprobs, ref_logprobs=ref_logprobs)
    gap = new - ref
    if estimator == "k1":
        return gap
    if estimator == "k2":
        return jnp.square(gap) / 2
    # expm1 keeps the digits that 1 − e^(−d) − d would cancel for small d.
    return linear_expm1(-gap, MAX_LOG_RATIO) + gap


def token_rewards(
    kl: Array, scores: Array, mask: Array, *, kl_coef: float | Array, score_at: str = "eos"
) -> tuple[jax.Array, jax.Array]:
    """Per-token rewards of each answer: a KL penalty on every token, the score on one.

    r_t = −c · kl_t + [t = e] · score, so that Σ_t r_t = score − c · Σ_t kl_t.
    Ziegler et al. 2019 (arXiv 1909.08593), eq. 2, spread over the tokens.

    Args:
      kl: per-token KL estimate, `[B, T]`.
      scores: one score per answer, `[B]`.
      mask: True on the answer's tokens, `[B, T]`.
      kl_coef: c ≥ 0, a number or a scalar array.
      score_at: "eos": e is the last token of the answer. "after_eos": e is the next position, if
        the row has one, otherwise the last token (TRL's convention).

    Returns:
      `(rewards, value_mask)`, `[B, T]`: float32 rewards, 0 outside the answer, and a bool mask of
      the positions with a reward, `mask` plus e, for `gae` to run over. A row without answer tokens
      gets no reward and no value.

    Raises:
      ValueError: an unknown `score_at`, or shapes that do not fit.

    >>> rewards, _ = token_rewards(
    ...     jnp.array([[0.0, 1.0, 2.0]]), jnp.array([5.0]), jnp.array([[False, True, True]]),
    ...     kl_coef=0.5)
    >>> rewards
    Array([[ 0. , -0.5,  4. ]], dtype=float32)
    """
    check_score_at(score_at)
    as_float32(kl=kl, mask=mask)
    mask = as_bool(mask)
    penalty = keep(kl, mask)
    if jnp.shape(scores) != penalty.shape[:1] or penalty.ndim != 2:
        raise ValueError(
            f"wanted kl [B, T] and scores [B], got kl {penalty.shape} and scores "
            f"{jnp.shape(scores)}; pass one score a row"
        )
    position = jnp.arange(penalty.shape[1], dtype=jnp.int32)[None, :]
    end = jnp.max(jnp.where(mask, position, -1), axis=1, keepdims=True)
    if score_at == "after_eos":
        last = penalty.shape[1] - 1
        end = jnp.where(end >= 0, jnp.minimum(end + 1, last), end)
    at_end = position == end
    score = jnp.where(at_end, jnp.asarray(scores, jnp.float32)[:, None], 0.0)
    return score - kl_coef * penalty, mask | at_end


def gae(
    rewards: Array, values: Array, mask: Array, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation over the valid positions of each row.

    δ_t = r_t + γ V_(t+1) − V_t, A_t = δ_t + γλ A_(t+1), R_t = A_t + V_t, with V = A = 0 after the
    last valid position. Schulman et al. 2016 (arXiv 1506.02438), eq. 16.

    "t + 1" is the next *valid* position: padding and gaps (a tool's output between two turns) are
    skipped, and do not add steps of discount.

    Args:
      rewards: per token, `[B, T]`.
      values: the critic's V, `[B, T]`.
      mask: True on valid positions, `[B, T]`.
      gamma: γ in [0, 1], the discount per token.
      lam: λ in [0, 1]: 0 trusts the critic (one step), 1 the sampled return.

    Returns:
      `(advantages, returns)`, float32 `[B, T]`, 0 outside the mask; advantages not whitened.

    Raises:
      ValueError: γ or λ out of range, or shapes that differ.

    >>> rewards, values = jnp.array([[0.0, 1.0]]), jnp.array([[0.5, 0.5]])
    >>> gae(rewards, values, jnp.ones((1, 2), bool), lam=0.0)
    (Array([[0. , 0.5]], dtype=float32), Array([[0.5, 1. ]], dtype=float32))
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if outside(number, lambda x: 0 <= x <= 1):
            raise ValueError(f"{name}={number}: wanted 0 ≤ {name} ≤ 1")
    as_float32(rewards=rewards, values=values, mask=mask)
    mask = as_bool(mask)
    reward_t, value_t = keep(rewards, mask), keep(values, mask)

    def step(
        following: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_advantage, next_value = following
        reward, value, valid = now
        advantage = reward + gamma * next_value - value + gamma * lam * next_advantage
        carried = (
            jnp.where(valid, advantage, next_advantage),
            jnp.where(valid, value, next_value),
        )
        return carried, jnp.where(valid, advantage, 0.0)

    nothing = jnp.zeros_like(reward_t[..., 0])
    over_time = tuple(jnp.moveaxis(x, -1, 0) for x in (reward_t, value_t, mask))
    _, advantages = jax.lax.scan(step, (nothing, nothing), over_time, reverse=True)
    advantages = jnp.moveaxis(advantages, 0, -1)
    return advantages, advantages + value_t


def policy_loss(
    logprobs: Array,
    old_logprobs: Array,
    advantages: Array,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
) -> jax.Array:
    """Clipped surrogate loss per token.

    ρ = π/π_old, ℓ = max(−A ρ, −A clip(ρ, 1 − ε, 1 + ε_high)): Schulman et al. 2017 (arXiv
    1707.06347), eq. 7, negated. With `dual_clip` c, where A < 0: ℓ = min(ℓ, −c A): Ye et al. 2020
    (arXiv 1912.09729), eq. 5. A separate upper bound ("clip-higher") is from Yu et al. 2025 (DAPO,
    arXiv 2503.14476).

    Args:
      logprobs: log π of the sampled tokens, `[B, T]` (any shape); the gradient flows here.
      old_logprobs: log π_old, under the policy that sampled the tokens, the same shape.
      advantages: A, the same shape.
      clip_range: ε in (0, 1), the lower bound is 1 − ε.
      clip_range_high: ε_high > 0, the upper bound is 1 + ε_high; None for ε.
      dual_clip: c > 1, bounds the loss of a token with a negative advantage that became much more
        likely; None for no such bound.

    Returns:
      float32, the same shape; not reduced and not masked. At π = π_old it is −A.

    Raises:
      ValueError: an option out of range, or shapes that differ.

    >>> policy_loss(jnp.log(jnp.array([1.5])), jnp.zeros(1), jnp.ones(1))
    Array([-1.2], dtype=float32)
    """
    check_clip(clip_range, clip_range_high, dual_clip)
    new, old, advantages = as_float32(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages
    )
    high = clip_range if clip_range_high is None else clip_range_high
    ratio = jnp.exp(jnp.clip(new - old, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    clipped = jnp.clip(ratio, 1 - clip_range, 1 + high)
    losses = jnp.maximum(-advantages * ratio, -advantages * clipped)
    if dual_clip is None:
        return losses
    return jnp.where(advantages < 0, jnp.minimum(losses, -dual_clip * advantages), losses)


def value_loss(
    values: Array, old_values: Array, returns: Array, *, clip_range_value: float | None = 0.2
) -> jax.Array:
    """Squared error of the critic per token, with the value clipped around the old one.

    ℓ = ½ max((V − R)², (clip(V, V_old − δ, V_old + δ) − R)²): the value clipping of PPO's
    published code (not in the paper); see Huang et al. 2024 (arXiv 2403.17031).

    Args:
      values: V, `[B, T]` (any shape); the gradient flows here.
      old_values: V_old, before the update, the same shape.
      returns: R, the same shape.
      clip_range_value: δ > 0; None for no clipping, ℓ = ½ (V − R)².

    Returns:
      float32, the same shape, ≥ 0; not reduced and not masked.

    Raises:
      ValueError: δ out of range, or shapes that differ.

    >>> value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([1.0]), clip_range_value=0.5)
    Array([0.125], dtype=float32)
    """
    check_clip_value(clip_range_value)
    new, old, target = as_float32(values=values, old_values=old_values, returns=returns)
    error = jnp.square(new - target)
    if clip_range_value is None:
        return 0.5 * error
    near = jnp.clip(new, old - clip_range_value, old + clip_range_value)
    return 0.5 * jnp.maximum(error, jnp.square(near - target))


def missing_eos_penalty(scores: Array, finished: Array, penalty: float) -> jax.Array:
    """Subtracts `penalty` from the score of each answer that did not end with a stop token.

    s' = s − p · [not finished], as TRL's `missing_eos_penalty`.

    Args:
      scores: `[B]` (any shape).
      finished: True where the answer ended with a stop token, the same shape.
      penalty: p ≥ 0, in units of the score.

    Returns:
      float32, the same shape.

    Raises:
      ValueError: a negative penalty, or shapes that differ.

    >>> missing_eos_penalty(jnp.array([2.0, 2.0]), jnp.array([True, False]), 1.5)
    Array([2. , 0.5], dtype=float32)
    """
    if outside(penalty, lambda x: x >= 0):
        raise ValueError(f"penalty={penalty}: wanted a number ≥ 0, which is subtracted")
    scores, _ = as_float32(scores=scores, finished=finished)
    return jnp.where(as_bool(finished), scores, scores - penalty)


def adaptive_kl_coef(
    kl_coef: float | Array,
    measured_kl: float | Array,
    *,
    target: float,
    horizon: float,
    batch_size: int,
) -> jax.Array:
    """The KL coefficient after one iteration of the proportional controller.

    c ← c · (1 + clip(KL/target − 1, −0.2, 0.2) · n/horizon): Ziegler et al. 2019 (arXiv
    1909.08593), §2.2.

    Args:
      kl_coef: c, as used in this iteration.
      measured_kl: mean KL of an answer (summed over its tokens), in nats.
      target: the KL to aim for, > 0, in nats per answer.
      horizon: the number of answers over which a persistent error of 20 % changes c by 20 %, > 0.
      batch_size: n, answers in this iteration.

    Returns:
      A float32 scalar, the next coefficient.

    Raises:
      ValueError: `target` or `horizon` is not positive.

    >>> adaptive_kl_coef(1.0, 12.0, target=6.0, horizon=1000, batch_size=625)
    Array(1.125, dtype=float32)
    """
    for name, number in (("target", target), ("horizon", horizon)):
        if outside(number, lambda x: x > 0):
            raise ValueError(f"{name}={number}: wanted a number > 0")
    error = jnp.clip(jnp.asarray(measured_kl, jnp.float32) / target - 1, -0.2, 0.2)
    return jnp.asarray(kl_coef, jnp.float32) * (1 + error * batch_size / horizon)


def check_kl_estimator(estimator: str) -> None:
    """Raises ValueError for an estimator that `kl` does not know."""
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}: wanted one of {', '.join(KL_ESTIMATORS)}")


def check_score_at(score_at: str) -> None:
    """Raises ValueError for a position that `token_rewards` does not know."""
    if score_at not in SCORE_POSITIONS:
        raise ValueError(f"score_at={score_at!r}: wanted one of {', '.join(SCORE_POSITIONS)}")


def check_clip(
    clip_range: float, clip_range_high: float | None = None, dual_clip: float | None = None
) -> None:
    """Raises ValueError for options of `policy_loss` that are out of range."""
    if outside(clip_range, lambda x: 0 < x < 1):
        raise ValueError(f"clip_range={clip_range}: wanted 0 < clip_range < 1; 0.2 is usual")
    if clip_range_high is not None and outside(clip_range_high, lambda x: x > 0):
        raise ValueError(
            f"clip_range_high={clip_range_high}: wanted a number > 0, or None for clip_range"
        )
    if dual_clip is not None and outside(dual_clip, lambda x: x > 1):
        raise ValueError(f"dual_clip={dual_clip}: wanted a number > 1, or None for no such bound")


def check_clip_value(clip_range_value: float | None) -> None:
    """Raises ValueError for a value clip range that is not positive."""
    if clip_range_value is not None and outside(clip_range_value, lambda x: x > 0):
        raise ValueError(
            f"clip_range_value={clip_range_value}: wanted a number > 0, or None for no clipping"
        )
