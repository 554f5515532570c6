"""A sum that does not depend on its order: for sums that cancel, such as sums of advantages.

Float32 rounds every partial sum. The mean of 500 whitened advantages, whose sum is 0, was 4.5e-7 on
one device and 1e-8 on eight: a gap as large as the one allowed between layouts for a policy loss of
1e-3.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxalign.types import Array

_DIGITS = 24
"""Binary digits of a float32."""


@jax.custom_jvp
def exact_sum(x: Array) -> jax.Array:
    """Σ x over all axes, right to about the last digit, in whatever order parts are added.

    Every number is split in three: a multiple of a power of two u₁, a multiple of u₂ < u₁, and the
    rest. The units are coarse enough that float32 holds every sum of multiples exactly, in any
    order. The rest is too small to matter: Demmel and Nguyen 2013 ("Fast reproducible
    floating-point summation"), §III. The units come from the largest |x|, which is exact as well.

    Args:
      x: any shape. With more than 2²² entries, the sums of multiples lose their last digits too.

    Returns:
      A float32 scalar. Not finite where an entry is not.

    >>> numbers = jnp.array([3e7, 1.0, -3e7, 1.0])
    >>> jnp.sum(numbers), exact_sum(numbers)
    (Array(1., dtype=float32), Array(2., dtype=float32))
    """
    x = jnp.asarray(x, jnp.float32)
    if x.size == 0:
        return jnp.float32(0)
    digits = max(1, _DIGITS - 1 - math.ceil(math.log2(x.size)))  # of a multiple
    exponent = jnp.frexp(jnp.max(jnp.abs(x)))[1]  # |x| < 2^exponent
    total = jnp.float32(0)
    for _ in range(2):
        exponent = exponent - digits
        unit = jnp.ldexp(jnp.float32(1), exponent)
        multiples = jnp.round(x / unit)
        total += jnp.sum(multiples) * unit
        x = x - multiples * unit
    return total + jnp.sum(x)


@exact_sum.defjvp
def _exact_sum_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return exact_sum(x), jnp.sum(jnp.asarray(tangent, jnp.float32))
