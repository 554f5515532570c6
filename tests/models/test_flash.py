"""The Pallas kernels for GPUs, in Pallas' interpreter, against float64 numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.attention import flash as flash_module
from jaxalign.models.attention.flash import Tile, Tiles, flash, visible_blocks
from jaxalign.models.attention.flash_kernels import Tokens
from jaxalign.models.attention.mask import Segments

# Blocks so small that short rows have many, and different ones in each kernel.
SMALL = Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 16, 4, 2))


def random_row(rng, length, *, branches):
    """ids, positions and branches `[length]`: documents, some with branches, padding on a side."""
    ids, positions, branch = np.zeros((3, length), np.int32)
    at = int(rng.integers(0, 8)) if rng.random() < 0.3 else 0
    end = length - int(rng.integers(0, length // 3))
    number = 0
    while at < end:
        number += 1
        size = min(end - at, int(rng.integers(1, length)))
        here = slice(at, at + size)
        ids[here], positions[here] = number, np.arange(size)
        if branches and rng.random() < 0.7:
            shared = int(rng.integers(0, size))
            cuts = [shared, *sorted(rng.integers(shared, size + 1, 2)), size]
            for which, (start, stop) in enumerate(itertools.pairwise(cuts), start=1):
                branch[at + start : at + stop] = which
                positions[at + start : at + stop] = shared + np.arange(stop - start)
        at += size
    return ids, positions, branch


def mask_of(ids, positions, branch, window):
    """The attention mask of a row `[T, T]`, one query at a time."""
    length = len(ids)
    mask = np.zeros((length, length), bool)
    for t in range(length):
        mask[t] = (np.arange(length) <= t) & (ids == ids[t]) & (ids > 0)
        mask[t] &= (branch == 0) | (branch == branch[t])
        mask[t] &= positions[t] - positions < window
    return mask


def numpy_attention(query, key, value, mask, softcap, above):
    """Output and gradients of scaled queries, keys and values `[T, ·, d]` in float64."""
    query, key, value, above = (np.asarray(x, np.float64) for x in (query, key, value, above))
    heads, group = query.shape[1], query.shape[1] // key.shape[1]
    out, to_query = np.zeros_like(query), np.zeros_like(query)
    to_key, to_value = np.zeros_like(key), np.zeros_like(value)
    for h in range(heads):
        k = h // group
        scores, slope = query[:, h] @ key[:, k].T, 1.0
        if softcap is not None:
            capped = np.tanh(scores / softcap)
            scores, slope = softcap * capped, 1 - capped**2
        scores = np.where(mask, scores, -np.inf)
        top = np.where(mask.any(1), scores.max(1), 0)[:, None]
        weights = np.exp(scores - top)
        weights /= np.where(mask.any(1), weights.sum(1), 1)[:, None]
        out[:, h] = weights @ value[:, k]
        to_weights = above[:, h] @ value[:, k].T
        to_scores = weights * (to_weights - (weights * to_weights).sum(1, keepdims=True)) * slope
        to_query[:, h] = to_scores @ key[:, k]
        to_key[:, k] += to_scores.T @ query[:, h]
        to_value[:, k] += weights.T @ above[:, h]
    return out, to_query, to_key, to_value


@functools.partial(jax.jit, static_argnames=("softcap", "window"))
def output_and_gradients(query, key, value, segments, windowed, above, softcap, window):
    def run(query, key, value):
        return flash(query, key, value, segments, segments, windowed, window=window,
                     softcap=softcap)  # fmt: skip

    out, pullback = jax.vjp(run, query, key, value)
    return out, *pullback(above)


WINDOW = 7

# Length, heads, key heads, width, soft cap, branches. No block divides the lengths.
SHAPES = [
    (45, 2, 2, 16, None, False),
    (77, 8, 1, 8, 3.0, True),
    (50, 6, 2, 24, None, True),
    (83, 4, 2, 12, 2.0, False),
]


@pytest.mark.parametrize("shape", SHAPES, ids=["heads", "one-key-head", "grouped", "capped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_on_random_rows(shape, dtype, monkeypatch):
    """15 rows of each shape in float32: documents, padding, branches, windows that hold or not."""
    if dtype == "bfloat16" and shape is not SHAPES[2]:
        pytest.skip("one shape shows the dtype")
    monkeypatch.setattr(flash_module, "TILES", {32: SMALL})
    length, heads, kv_heads, width, softcap, branches = shape
    rng = np.random.default_rng(length)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for _ in range(15 if dtype == "float32" else 3):
        ids, positions, branch = random_row(rng, length, branches=branches)
        arrays = [
            jnp.asarray(rng.normal(size=(1, length, n, width)), dtype)
            for n in (heads, kv_heads, kv_heads, heads)
        ]
        windowed = rng.random() < 0.5
        mask = mask_of(ids, positions, branch, WINDOW if windowed else length)
        segments = Segments(ids[None], positions[None], branch[None] if branches else None)
        got = output_and_gradients(
            *arrays[:3], segments, np.array([windowed]), arrays[3], softcap, WINDOW
        )
        *inputs, above = (np.asarray(x[0], np.float64) for x in arrays)
        want = numpy_attention(*inputs, mask, softcap, above)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == dtype
            np.testing.assert_allclose(
                np.asarray(a[0], np.float64), b, 0, tolerance * max(1, np.abs(b).max())
            )


def test_blocks_that_are_skipped_show_no_pair():
    """And those that are read are what documents, branches and window leave of the triangle."""
    rng = np.random.default_rng(7)
    length, size = 128, 16
    for _ in range(20):
        ids, positions, branch = random_row(rng, length, branches=True)
        window = int(rng.integers(2, length))
        mask = mask_of(ids, positions, branch, window)
        columns = np.arange(length, dtype=np.int32)
        query = Tokens(*(jnp.asarray(x)[None] for x in (columns, ids, positions, branch)))
        got = visible_blocks(query, query, jnp.full(1, window), size, size)[0]
        want = mask.reshape(length // size, size, -1, size).any((1, 3))
        assert not np.any(want & ~np.asarray(got))
    # A prompt of two blocks, and three answers of two blocks each.
    branch = np.repeat([0, 1, 2, 3], 32)
    positions = np.where(branch > 0, 32 + columns % 32, columns)
    rows = (columns, np.ones(length, np.int32), positions, branch)
    query = Tokens(*(jnp.asarray(x)[None] for x in rows))
    got = visible_blocks(query, query, jnp.full(1, length), size, size)[0]
    assert got.astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1],
    ]


def test_wider_heads_are_refused():
    x = jnp.ones((1, 4, 1, 512))
    segments = Segments(np.ones((1, 4), np.int32), np.arange(4)[None])
    with pytest.raises(ValueError, match="heads of at most 256; got 512"):
        flash(x, x, x, segments, segments, None, window=None, softcap=None)
