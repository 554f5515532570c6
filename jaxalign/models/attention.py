"""Attention masks that respect documents, branches and windows, and the attention function."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.types import Array

HIDDEN = -1e30
"""Score of what may not be seen; finite, so that a row that sees nothing gives no NaN."""

_BLOCK = 128
"""Least number of queries taken at a time: smaller products do not keep a processor busy."""

_MOST_BLOCKS = 8
"""Most blocks of queries; more would save little more than the half that 8 nearly do."""


def causal_mask(segment_ids: Array, branch_ids: Array | None = None) -> jax.Array:
    """Which token sees which: `[B, 1, T, T]` bool, earlier or same column and same segment.

    Args:
      segment_ids: int `[B, T]`.
      branch_ids: int `[B, T]`; within its segment a token sees branch 0 and its own only.
    """
    segment_ids = jnp.asarray(segment_ids)
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    if branch_ids is not None:
        branch_ids = jnp.asarray(branch_ids)
        shared = branch_ids[:, None, :] == 0
        same = same & (shared | (branch_ids[:, :, None] == branch_ids[:, None, :]))
    return (same & causal)[:, None]


def window_mask(positions: Array, seen: Array, window: int) -> jax.Array:
    """Which token is near enough to which: `[B, 1, T, S]` bool.

    Distance is between positions, not columns: in a row with branches they differ.

    Args:
      positions: int `[B, T]` of the tokens that look.
      seen: int `[B, S]` of those looked at.
      window: how many tokens one sees, itself included.
    """
    distance = jnp.asarray(positions)[:, :, None] - jnp.asarray(seen)[:, None, :]
    return (distance < window)[:, None]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array,
    scale: jax.Array | float | None = None, softcap: float | None = None, *, causal: bool = False,
) -> jax.Array:  # fmt: skip
    """Softmax attention `softmax(scale · q·kᵀ) · v` with grouped key and value heads.

    The backward pass keeps no `[T, S]` matrix: it forms the weights again from the logsumexp of
    each row (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4, without its tiling).

    Args:
      query: `[B, T, H, head_dim]`.
      key: `[B, S, K, head_dim]`; each serves H / K query heads.
      value: `[B, S, K, head_dim]`.
      mask: bool `[B, 1, T, S]`. A row without any True (padding) gets a meaningless finite value.
      scale: of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: they stay.
      causal: the mask shows no column after a query's own (T = S), so that those need no
        computing.

    Returns:
      `[B, T, H, head_dim]`; the softmax is computed in float32.
    """
    rows, new, heads, width = query.shape
    shared = key.shape[2]
    # The query heads of a group are stacked along the rows of one matrix, so that both products
    # are plain batched matrix products without repeated keys. On CPUs this is about twice as fast
    # as the general contraction of jax.nn.dot_product_attention for narrow heads.
    scale = width**-0.5 if scale is None else scale
    query = (query * scale).astype(key.dtype)  # a traced scale is float32
    query = query.reshape(rows, new, shared, -1, width)
    out = _attend(
        softcap,
        causal,
        query.transpose(0, 2, 3, 1, 4),
        key.transpose(0, 2, 1, 3),
        value.transpose(0, 2, 1, 3),
        mask,
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, new, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(
    softcap: float | None, causal: bool, query: jax.Array, key: jax.Array, value: jax.Array,
    mask: jax.Array,
) -> jax.Array:  # fmt: skip
    """Query `[B, K, G, T, d]`, key and value `[B, K, S, d]`, mask `[B, 1, T, S]` → as query."""
    return _forward(softcap, causal, query, key, value, mask)[0]


def _forward(softcap: float | None, causal: bool, query, key, value, mask):
    outs, logzs = [], []
    for here, seen in _blocks(query.shape[3], key.shape[2], causal):
        scores, _ = _scores(softcap, query[..., here, :], key[:, :, seen], mask[..., here, seen])
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        out = _matmul(weights.astype(value.dtype), value[:, :, seen])
        outs.append((out / total).astype(query.dtype))
        logzs.append(top + jnp.log(total))
    out, logz = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=3) for x in (outs, logzs))
    return out, (query, key, value, mask, out, logz)


def _backward(softcap: float | None, causal: bool, saved, gradient):
    query, key, value, mask, out, logz = saved
    # Σ_s p_s · (∂L/∂p_s) of each query, without the weights.
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    to_query = []
    to_key, to_value = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    for here, seen in _blocks(query.shape[3], key.shape[2], causal):
        part, keys, values = query[..., here, :], key[:, :, seen], value[:, :, seen]
        scores, slope = _scores(softcap, part, keys, mask[..., here, seen])
        weights = jnp.exp(scores - logz[..., here, :])
        above = gradient[..., here, :]
        to_weights = _matmul(above, values.swapaxes(-1, -2))
        to_scores = weights * (to_weights - inner[..., here, :])
        if slope is not None:
            to_scores = to_scores * slope
        weights, to_scores = weights.astype(query.dtype), to_scores.astype(query.dtype)
        to_query.append(_matmul(to_scores, keys).astype(query.dtype))
        to_key = to_key.at[:, :, seen].add(_columns(part, to_scores))
        to_value = to_value.at[:, :, seen].add(_columns(above, weights))
    joined = to_query[0] if len(to_query) == 1 else jnp.concatenate(to_query, axis=3)
    return joined, to_key.astype(key.dtype), to_value.astype(value.dtype), None


_attend.defvjp(_forward, _backward)


def _blocks(length: int, seen: int, causal: bool) -> list[tuple[slice, slice]]:
    """Queries to take at a time, each with the columns that they may see."""
    if not causal or length != seen or length < 2 * _BLOCK:
        return [(slice(0, length), slice(0, seen))]
    size = max(_BLOCK, -(-length // (_MOST_BLOCKS * _BLOCK)) * _BLOCK)
    stops = [min(start + size, length) for start in range(0, length, size)]
    return [(slice(stop - ((stop - 1) % size + 1), stop), slice(0, stop)) for stop in stops]


def _scores(
    softcap: float | None, query: jax.Array, key: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores `[B, K, G, T, S]` in float32, and the slope of the soft-cap where there is."""
    scores = _matmul(query, key.swapaxes(-1, -2))
    slope = None
    if softcap is not None:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    return jnp.where(mask[:, :, None], scores, HIDDEN), slope


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[B, K, G, T, n]` by `[B, K, n, m]`, the G·T rows as one matrix; float32."""
    out = jnp.matmul(
        x.reshape(*x.shape[:2], -1, x.shape[-1]), y, preferred_element_type=jnp.float32
    )
    return out.reshape(*x.shape[:-1], y.shape[-1])


def _columns(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ over G and T of y ⊗ x: `[B, K, G, T, d]`, `[B, K, G, T, S]` → `[B, K, S, d]`.

    Written as (xᵀ·y)ᵀ, so that the narrow operand is the one to be transposed.
    """
    flat = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))
    narrow, wide = flat
    out = jnp.matmul(narrow.swapaxes(-1, -2), wide, preferred_element_type=jnp.float32)
    return out.swapaxes(-1, -2)
