"""e^x − 1 continued as a straight line, so that value and gradient stay finite."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def linear_expm1(x: jax.Array, start: float) -> jax.Array:
    """e^x − 1 up to `start`, then its tangent at `start`: value and gradient stay finite."""
    inside = x < start
    curve = jnp.expm1(jnp.where(inside, x, start))
    tangent = math.expm1(start) + math.exp(start) * (x - start)
    return jnp.where(inside, curve, tangent)
