"""The projection's own backward pass, in the form of every backend, against numpy."""

import functools

import jax
import numpy as np
import pytest

from jaxalign.models import ops

BRANCHES = {
    "transposed": ops._transposed,
    "contracted": functools.partial(ops._contracted, axes="embed mlp"),
    "contracted-embed-last": functools.partial(ops._contracted, axes="heads/8 embed"),
}


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
def test_gradients_of_each_branch(branch):
    rng = np.random.default_rng(0)
    x, kernel, dy = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (5, 7), (2, 3, 7)))
    dx, dkernel = jax.jit(branch)(x, kernel, dy)
    want = sum(np.outer(x[b, t], dy[b, t]) for b in range(2) for t in range(3))
    np.testing.assert_allclose(dkernel, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.tensordot(dy, kernel, (2, 1)), rtol=1e-5, atol=1e-5)


def test_the_gradient_is_the_projections():
    rng = np.random.default_rng(1)
    x, kernel, dy = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5), (5, 7), (2, 3, 7)))
    value, pull = jax.vjp(lambda x, kernel: ops.project(x, kernel, "embed mlp"), x, kernel)
    np.testing.assert_allclose(value, np.tensordot(x, kernel, 1), rtol=1e-5, atol=1e-5)
    dx, dkernel = pull(dy)
    np.testing.assert_allclose(dx, np.tensordot(dy, kernel, (2, 1)), rtol=1e-5, atol=1e-5)
    want = np.tensordot(x, dy, ((0, 1), (0, 1)))
    np.testing.assert_allclose(dkernel, want, rtol=1e-5, atol=1e-5)


def test_widening_has_the_products_of_a_projection_and_copies_no_wide_array():
    rng = np.random.default_rng(2)
    x, matrix, dy = (
        rng.normal(size=s).astype(np.float32) for s in ((4, 8, 2), (2, 40), (4, 8, 40))
    )

    def pulled(x, matrix, dy):
        value, pull = jax.vjp(ops.widen, x, matrix)
        return value, *pull(dy)

    value, dx, dmatrix = jax.jit(pulled)(x, matrix, dy)
    np.testing.assert_allclose(value, np.tensordot(x, matrix, 1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.tensordot(dy, matrix, (2, 1)), rtol=1e-5, atol=1e-5)
    want = np.tensordot(x, dy, ((0, 1), (0, 1)))
    np.testing.assert_allclose(dmatrix, want, rtol=1e-5, atol=1e-5)
    compiled = jax.jit(pulled).lower(x, matrix, dy).compile().as_text()
    assert "f32[40,32]" not in compiled  # dy of 32 tokens, transposed
