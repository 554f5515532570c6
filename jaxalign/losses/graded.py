"""Reward modelling from grades: helpfulness 3 of 4, verbosity 1, …, one number per attribute."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_float32
from jaxalign.types import Array


def squared_error(scores: Array, grades: Array) -> jax.Array:
    """The squared error of a predicted grade.

    ℓ = (r − y)²

    The regression reward models of HelpSteer (Wang et al. 2023, arXiv 2311.09528) and HelpSteer 2
    (Wang et al. 2024, arXiv 2406.08673). Where a row lacks a grade, zero both arrays with
    `jaxalign.losses.masked.keep`, and average over the grades that were given.

    Args:
      scores: r, `[B, A]` (any shape), one column per attribute.
      grades: y, the same shape, in the unit of the attribute's grades.

    Returns:
      float32, the shape of the scores, ≥ 0, in that unit squared; not reduced.

    Raises:
      ValueError: shapes differ.

    >>> squared_error(jnp.array([[3.5, 1.0]]), jnp.array([[4.0, 3.0]]))
    Array([[0.25, 4.  ]], dtype=float32)
    """
    scores, grades = as_float32(scores=scores, grades=grades)
    return jnp.square(scores - grades)
