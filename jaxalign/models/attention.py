"""Attention masks that respect documents, branches and windows, and the attention function."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array

_HIDDEN = -1e30
"""Score of what may not be seen; finite, so that a row that sees nothing gives no NaN."""


class Cache(NamedTuple):
    """Keys and values of the tokens read so far, for decoding.

    Attributes:
      keys: `[L, B, S, K, head_dim]`, rotated.
      values: `[L, B, S, K, head_dim]`.
      segment_ids: int32 `[B, S]`; 0 where nothing was written, or padding was.
      used: int32 scalar, number of columns written.
      positions: int32 `[B, S]`; None for models without windows, which have no use for them.
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    used: jax.Array
    positions: jax.Array | None = None


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


def cache_mask(cache_segments: jax.Array, segment_ids: jax.Array, used: jax.Array) -> jax.Array:
    """Which cached column each new token sees: `[B, 1, T, S]` bool.

    Args:
      cache_segments: `[B, S]`, new tokens already entered.
      segment_ids: `[B, T]` of the new tokens.
      used: number of columns before the new tokens.
    """
    new = used + jnp.arange(segment_ids.shape[1])
    columns = jnp.arange(cache_segments.shape[1])
    causal = columns[None, :] <= new[:, None]
    same = segment_ids[:, :, None] == cache_segments[:, None, :]
    return (same & causal[None])[:, None]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array,
    scale: jax.Array | float | None = None, softcap: float | None = None,
) -> jax.Array:  # fmt: skip
    """Softmax attention `softmax(scale · q·kᵀ) · v` with grouped key and value heads.

    Args:
      query: `[B, T, H, head_dim]`.
      key: `[B, S, K, head_dim]`; each serves H / K query heads.
      value: `[B, S, K, head_dim]`.
      mask: bool `[B, 1, T, S]`. A row without any True (padding) gets a meaningless finite value.
      scale: of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: they stay.

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
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, shared, -1, width)
    scores = jnp.matmul(
        query, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32
    ).reshape(rows, shared, -1, new, key.shape[1])
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(mask[:, :, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(rows, shared, -1, key.shape[1])
    out = jnp.matmul(weights, value.transpose(0, 2, 1, 3))
    out = out.reshape(rows, shared, -1, new, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, new, heads, width)
