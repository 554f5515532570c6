"""The key-value cache of decoding, and attention to it.

A decode step reads every weight and every cached key once and computes little, so it must not copy
either. Each layer therefore has its own arrays, which a step updates in place; slicing one array
for all layers would copy. Heads come before columns, `[B, K, S, head_dim]`, the layout that both
products take.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.xla_blocks import MASKED_SCORE
from jaxalign.models.base import DecoderConfig
from jaxalign.parallel.sharding import axis_shards, constrain
from jaxalign.types import Array


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      keys: for each layer `[B, K, S, head_dim]`, rotated.
      values: for each layer `[B, K, S, head_dim]`.
      segment_ids: int32 `[B, S]`; 0 for empty columns and padding.
      positions: int32 `[B, S]`.
      used: the next column to write: an int32 scalar, or `[B]`, a column for each row.
      experts: for each layer integers `[B, S, k]`, the experts of each token. None: not kept.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    segment_ids: jax.Array
    positions: jax.Array
    used: jax.Array
    experts: tuple[jax.Array, ...] | None = None


def empty_cache(
    config: DecoderConfig, rows: int, length: int, dtype: Any, experts: Any = None
) -> Cache:
    """A cache for `rows` sequences of up to `length` tokens, split over rows and heads.

    `experts` is the dtype in which it stores the experts taken; None: it stores none.
    """
    shape = (rows, config.num_kv_heads, length, config.head_dim)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(split(jnp.zeros(shape, dtype)) for _ in range(config.num_layers))

    return Cache(
        keys=layers(),
        values=layers(),
        segment_ids=constrain(jnp.zeros((rows, length), jnp.int32), "cache_rows cache_length"),
        positions=constrain(jnp.zeros((rows, length), jnp.int32), "cache_rows cache_length"),
        used=jnp.zeros((), jnp.int32),
        experts=None
        if experts is None
        else tuple(
            constrain(
                jnp.zeros((rows, length, config.experts_per_token), experts),
                "cache_rows cache_length hidden",
            )
            for _ in range(config.num_layers)
        ),
    )


def resize_cache(cache: Cache, count: int) -> Cache:
    """A cache of `count` columns: the first ones, or all of them followed by empty ones."""

    def fit(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, 0)] * x.ndim
        padding[axis] = (0, max(0, count - x.shape[axis]))
        return jnp.pad(jax.lax.slice_in_dim(x, 0, min(count, x.shape[axis]), axis=axis), padding)

    if count == cache.segment_ids.shape[1]:
        return cache
    keys, values = (tuple(split(fit(x, 2)) for x in side) for side in (cache.keys, cache.values))
    experts = jax.tree.map(lambda x: fit(x, 1), cache.experts)
    return Cache(
        keys, values, fit(cache.segment_ids, 1), fit(cache.positions, 1), cache.used, experts
    )


def split(x: jax.Array) -> jax.Array:
    """Shards one layer's keys or values, `[B, K, S, head_dim]`, over rows and heads.

    If the mesh does not divide the heads (fewer heads than shards), every shard has all heads.
    """
    whole = x.shape[1] % axis_shards("cache_heads")
    return constrain(x, f"cache_rows {'hidden' if whole else 'cache_heads'} cache_length hidden")


def to_cache(x: jax.Array, dtype: Any) -> jax.Array:
    """Converts keys or values to the cache's dtype; values beyond an 8-bit float's saturate."""
    if jnp.finfo(dtype).bits == 8:
        most = float(jnp.finfo(dtype).max)
        x = jnp.clip(x, -most, most)
    return x.astype(dtype)


def write(layer: jax.Array, new: jax.Array, used: jax.Array) -> jax.Array:
    """Writes the keys or values of T new tokens, `[B, T, K, head_dim]`, from column `used` on."""
    return write_columns(layer, to_cache(new, layer.dtype).transpose(0, 2, 1, 3), used, axis=2)


def write_columns(into: jax.Array, new: jax.Array, used: jax.Array, axis: int) -> jax.Array:
    """Writes `new` into `into`, from index `used` of an axis on, which is a scalar or `[B]`.

    With one column for all rows this is an update in place; a column for each row is a scatter.
    """
    if used.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(into, new, used, axis)
    row = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1)
    return jax.vmap(row)(into, new, used)


def attend_cached(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: Array,
    scale: jax.Array | float | None = None, softcap: float | None = None,
) -> jax.Array:  # fmt: skip
    """Like `attention.attend`, to one layer of a cache and without a gradient.

    Args:
      query: `[B, T, H, head_dim]`.
      keys: `[B, K, S, head_dim]`; each serves H / K query heads.
      values: `[B, K, S, head_dim]`.
      mask: bool `[B, 1, T, S]`.
      scale: the factor of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: no cap.

    Returns:
      `[B, T, H, head_dim]`; the softmax is computed in float32.
    """
    rows, new, heads, width = query.shape
    dtype, groups = query.dtype, heads // keys.shape[1]
    scale = width**-0.5 if scale is None else scale
    query = (query * scale).astype(dtype).reshape(rows, new, -1, groups, width)
    # The G heads of a group and the T new tokens become rows of one matrix.
    # [B, T, K, G, d] → [B, K, G, T, d] → [B, K, G·T, d]
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, -1, groups * new, width)
    scores = jnp.einsum(
        "bkgd,bksd->bkgs", query, keys.astype(dtype), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    mask = jnp.tile(mask, (1, 1, groups, 1))  # [B, 1, T, S] → [B, 1, G·T, S]
    scores = jnp.where(mask, scores, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgs,bksd->bkgd", weights.astype(dtype), values.astype(dtype),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out = (out / total).astype(dtype).reshape(rows, -1, groups, new, width)
    # [B, K, G, T, d] → [B, T, K, G, d] → [B, T, H, d]
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, new, heads, width)
