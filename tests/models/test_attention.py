"""Attention and its own backward pass, against a plain softmax that JAX differentiates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.attention import attend, causal_mask


def plain(query, key, value, mask, scale, softcap):
    repeats = query.shape[2] // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    scores = scale * jnp.einsum("bthd,bshd->bhts", query, key)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, value)


@pytest.mark.parametrize(
    ("length", "softcap", "causal"),
    [(9, None, False), (9, 2.0, True), (300, 2.0, True), (300, None, True), (1100, None, True)],
)
def test_values_and_gradients(length, softcap, causal):
    """Short rows in one piece, long ones in blocks that skip what lies ahead."""
    rng = np.random.default_rng(0)
    shapes = ((1, length, 4, 8), (1, length, 2, 8), (1, length, 2, 8))
    inputs = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    mask = causal_mask(np.sort(rng.integers(1, 4, (1, length)), axis=1))
    weights = jnp.asarray(rng.normal(size=shapes[0]), jnp.float32)

    def ours(query, key, value, scale):
        out = attend(query, key, value, mask, scale, softcap, causal=causal)
        return jnp.sum(weights * out)

    def theirs(query, key, value, scale):
        return jnp.sum(weights * plain(query, key, value, mask, scale, softcap))

    got = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*inputs, 0.4)
    want = jax.jit(jax.value_and_grad(theirs, (0, 1, 2, 3)))(*inputs, 0.4)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, atol=1e-5 * max(scale, 10.0))


def test_rows_that_see_nothing_stay_finite():
    x = jnp.ones((1, 3, 2, 4))
    mask = jnp.zeros((1, 1, 3, 3), bool)
    value, grads = jax.value_and_grad(lambda x: jnp.sum(attend(x, x, x, mask)))(x)
    assert np.isfinite(value)
    assert np.isfinite(grads).all()


def test_no_score_matrix_is_kept_for_the_backward_pass():
    x = jax.ShapeDtypeStruct((1, 512, 2, 4), jnp.float32)
    mask = jnp.ones((1, 1, 512, 512), bool)
    _, pull = jax.eval_shape(lambda x: jax.vjp(lambda x: attend(x, x, x, mask, causal=True), x), x)
    kept = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float32]
    assert kept
    assert max(np.prod(shape) for shape in kept) <= 2 * 512 * 4
