"""Process rewards: every step of a solution is judged, not only its end."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_bool, as_float32, keep
from jaxalign.types import Array


def step_bce(scores: Array, labels: Array) -> jax.Array:
    """Binary cross-entropy of a step's label; the score is the log-odds that the step is right.

    ℓ = −y · log σ(r) − (1 − y) · log(1 − σ(r))

    Lightman et al. 2023 (*Let's Verify Step by Step*, arXiv 2305.20050, §2.6) with hard labels;
    Wang et al. 2023 (Math-Shepherd, arXiv 2312.08935), eq. 2, also with soft labels: the share of
    continuations that end well. Some train a softmax over two classes: that is this loss on the
    difference of the two logits.

    Args:
      scores: r, the scalar head at the last token of a step, any shape.
      labels: y in [0, 1], the same shape; 1: the step is right.

    Returns:
      float32, the shape of the scores, ≥ 0, in nats; one loss per step, not reduced.

    Raises:
      ValueError: shapes differ.

    >>> step_bce(jnp.log(jnp.array([3.0, 3.0])), jnp.array([1.0, 0.0]))  # −log ¾, −log ¼
    Array([0.28768206, 1.3862944 ], dtype=float32)
    """
    scores, labels = as_float32(scores=scores, labels=labels)
    return -labels * jax.nn.log_sigmoid(scores) - (1 - labels) * jax.nn.log_sigmoid(-scores)


def solution_score(scores: Array, mask: Array, reduction: str = "product") -> jax.Array:
    """The score of a whole solution, from the scores of its steps, as a log-probability.

    - "product": Σ log σ(r), the chance that every step is right (Lightman et al. 2023, §2.6);
    - "min": log σ of the worst step (Math-Shepherd).

    Args:
      scores: r `[B, T]`, log-odds that the step ending there is right.
      mask: `[B, T]`, True at the ends of steps.
      reduction: "product" or "min".

    Returns:
      float32 `[B]`, ≤ 0, in nats; 0 for a row without steps.

    Raises:
      ValueError: shapes differ, or another `reduction`.

    >>> scores = jnp.log(jnp.array([[3.0, 7.0, 1.0]]))  # right with 3/4, 7/8; the last is no step
    >>> jnp.exp(solution_score(scores, jnp.array([[True, True, False]])))
    Array([0.65625], dtype=float32)
    """
    if reduction not in ("product", "min"):
        raise ValueError(f"reduction={reduction!r}: wanted product or min")
    logprobs = keep(jax.nn.log_sigmoid(keep(scores, mask)), as_bool(mask))
    # A log-probability is at most 0, so the zeros outside the mask never change the minimum.
    return jnp.sum(logprobs, axis=1) if reduction == "product" else jnp.min(logprobs, axis=1)
