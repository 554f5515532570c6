"""log Σ exp(z) of logits minus their maximum, to full float32 precision."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class ExpSum(NamedTuple):
    """Σ exp(z) of each position in two parts, because 1 + 1e-9 would round to 1, with logarithm 0.

    Attributes:
      apart: the part that may be far larger than the other: see the functions below.
      rest: Σ exp(z) of the others.
    """

    apart: jax.Array
    rest: jax.Array

    def log(self) -> jax.Array:
        """log Σ exp(z)."""
        large = jnp.maximum(self.apart, self.rest)
        return jnp.log(large) + jnp.log1p(jnp.minimum(self.apart, self.rest) / large)


def exp_sum(shifted: jax.Array) -> ExpSum:
    """Σ exp(z) over the last axis, with the largest apart: its logarithm is exact everywhere.

    Args:
      shifted: z ≤ 0 with a 0 on the last axis: logits minus their maximum.
    """
    is_top = shifted >= 0
    ties = jnp.sum(is_top, axis=-1, dtype=jnp.float32)
    return ExpSum(ties, jnp.sum(jnp.where(is_top, 0.0, jnp.exp(shifted)), axis=-1))


def exp_sum_beside(shifted: jax.Array, column: jax.Array, value: jax.Array) -> ExpSum:
    """Σ exp(z) over the last axis, with one column apart: `value` minus its logarithm is exact.

    One pass less than `exp_sum`. If the column is the largest, exp(0) = 1 stands apart. If not, the
    sum's logarithm may lose digits, but z of the column, which is far from 0, keeps those of the
    difference.

    Args:
      shifted: z `[P, V]`, as above.
      column: int `[P]`; none is apart where it is no column.
      value: z of that column, `[P]`.
    """
    columns = jnp.arange(shifted.shape[-1], dtype=column.dtype)[None]  # [1, V]
    rest = jnp.sum(jnp.where(columns == column[:, None], 0.0, jnp.exp(shifted)), axis=-1)
    own = (column >= 0) & (column < shifted.shape[-1])
    return ExpSum(jnp.where(own, jnp.exp(value), 0.0), rest)
