"""log Σ exp(z) of logits minus their maximum, to full float32 precision."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ExpSum(NamedTuple):
    """Σ exp(z) of each position in two parts, because 1 + 1e-9 would round to 1, with logarithm 0.

    Attributes:
      ties: how many z are 0 (exp(z) = 1).
      rest: Σ exp(z) of the others.
    """

    ties: jax.Array
    rest: jax.Array

    def log(self) -> jax.Array:
        """log Σ exp(z)."""
        return jnp.log(self.ties) + jnp.log1p(self.rest / self.ties)


def exp_sum(shifted: jax.Array) -> ExpSum:
    """Σ exp(z) over the last axis.

    Args:
      shifted: z ≤ 0 with a 0 on the last axis: logits minus their maximum.
    """
    is_top = shifted >= 0
    ties = jnp.sum(is_top, axis=-1, dtype=jnp.float32)
    return ExpSum(ties, jnp.sum(jnp.where(is_top, 0.0, jnp.exp(shifted)), axis=-1))
