"""Keys and values in 8-bit floats: what is stored, and attention to it."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxalign.models.attention.kv_cache import attend_cached, to_cache, write


def test_eight_bits_round_to_the_nearest_and_saturate():
    x = np.array([0.0, 0.3, -7.7, 448.0, 464.5, -1e6], np.float32)
    # float8_e4m3fn: 3 bits of mantissa; beyond 464, half a step above 448, it has only NaN.
    want = [0.0, 0.3125, -7.5, 448.0, 448.0, -448.0]
    np.testing.assert_array_equal(
        np.asarray(to_cache(jnp.asarray(x), jnp.float8_e4m3fn), float), want
    )


def test_attention_to_eight_bits_is_that_to_what_they_hold():
    rng = np.random.default_rng(0)
    rows, heads, shared, length, width = 2, 4, 2, 7, 16
    query = rng.normal(size=(rows, 1, heads, width)).astype(np.float32)
    keys, values = rng.normal(size=(2, rows, length, shared, width)).astype(np.float32)
    empty = jnp.zeros((rows, shared, length, width), jnp.float8_e4m3fn)
    stored = [write(empty, jnp.asarray(x), jnp.int32(0)) for x in (keys, values)]
    assert all(x.nbytes == rows * shared * length * width for x in stored)
    got = attend_cached(query, *stored, np.ones((rows, 1, 1, length), bool))

    held = [x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) for x in (keys, values)]
    for row, head in np.ndindex(rows, heads):
        key, value = (x[row, :, head // (heads // shared)] for x in held)
        scores = key @ query[row, 0, head].astype(np.float64) / np.sqrt(width)
        weights = np.exp(scores - scores.max())
        np.testing.assert_allclose(got[row, 0, head], weights @ value / weights.sum(), 0, 1e-6)
