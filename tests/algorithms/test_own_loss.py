"""A loss from research code through `ja.make_step`: no model, numbers by hand."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxalign as ja


class Points(NamedTuple):
    x: np.ndarray  # [B]
    y: np.ndarray  # [B]
    mask: np.ndarray  # [B], which points count


def count(batch):
    return {"fit": jnp.sum(batch.mask, dtype=jnp.float32)}


def terms(params, batch):
    error = jnp.square(params["w"] * batch.x - batch.y)
    total = jnp.sum(jnp.where(batch.mask, error, 0.0))
    size = jnp.sum(batch.mask, dtype=jnp.float32)
    return {"fit": total}, {"mean_error": ja.Weighted(total, size)}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_step_of_least_squares(micro_batches):
    """Points that count lie unevenly over the micro-batches: a mean of means would be another."""
    batch = Points(
        np.array([1.0, 2.0, 3.0, 4.0], np.float32),
        np.array([1.0, 1.0, 1.0, 9.0], np.float32),
        np.array([True, False, True, True]),
    )
    step = ja.make_step(ja.Loss(count, terms), optax.sgd(0.1), micro_batches)
    state = ja.init_state({"w": np.float32(0.5)}, optax.sgd(0.1))
    state, metrics = step(state, batch)
    # Errors w·x − y: −0.5, 0.5, −7. Loss (0.25 + 0.25 + 49) / 3, gradient 2 (−0.5 + 1.5 − 28) / 3.
    np.testing.assert_allclose(metrics["loss"], 16.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["mean_error"], 16.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["weight/fit"], 3.0)
    np.testing.assert_allclose(metrics["grad_norm"], 18.0, rtol=1e-6)
    np.testing.assert_allclose(state.params["w"], 0.5 + 0.1 * 18.0, rtol=1e-6)
