"""The key-value cache of decoding, and attention to it.

A step of decoding reads every weight and every cached key once and computes little: what it may
not do is copy either. So every layer has arrays of its own, which a step updates in place and
reads where they lie (a slice of one array for all layers would be a copy), and each head's keys
lie together, as the products with them take them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.xla import MASKED_SCORE
from jaxalign.models.base import DecoderConfig
from jaxalign.parallel.sharding import axis_shards, constrain
from jaxalign.types import Array


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
      keys: for each layer `[B, K, S, head_dim]`, rotated.
      values: for each layer `[B, K, S, head_dim]`.
      segment_ids: int32 `[B, S]`; 0 where nothing was written, or padding was.
      positions: int32 `[B, S]`.
      used: int32 scalar, the column that is written next.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    segment_ids: jax.Array
    positions: jax.Array
    used: jax.Array


def empty_cache(config: DecoderConfig, rows: int, length: int, dtype: Any) -> Cache:
    """A cache for `rows` sequences of up to `length` tokens, split over rows and heads."""
    shape = (rows, config.num_kv_heads, length, config.head_dim)

    def layers() -> tuple[jax.Array, ...]:
        return tuple(split(jnp.zeros(shape, dtype)) for _ in range(config.num_layers))

    return Cache(
        keys=layers(),
        values=layers(),
        segment_ids=constrain(jnp.zeros((rows, length), jnp.int32), "cache_rows cache_length"),
        positions=constrain(jnp.zeros((rows, length), jnp.int32), "cache_rows cache_length"),
        used=jnp.zeros((), jnp.int32),
    )


def with_columns(cache: Cache, count: int) -> Cache:
    """The first `count` columns, or all of them and as many empty ones as make it so many."""

    def fit(x: jax.Array, axis: int) -> jax.Array:
        room = [(0, 0)] * x.ndim
        room[axis] = (0, max(0, count - x.shape[axis]))
        return jnp.pad(jax.lax.slice_in_dim(x, 0, min(count, x.shape[axis]), axis=axis), room)

    if count == cache.segment_ids.shape[1]:
        return cache
    keys, values = (tuple(split(fit(x, 2)) for x in side) for side in (cache.keys, cache.values))
    return Cache(keys, values, fit(cache.segment_ids, 1), fit(cache.positions, 1), cache.used)


def split(x: jax.Array) -> jax.Array:
    """Pins one layer's keys or values, `[B, K, S, head_dim]`: rows and heads over the mesh.

    Where the mesh does not divide the heads (fewer of them than shards), every shard has them all.
    """
    whole = x.shape[1] % axis_shards("cache_heads")
    return constrain(x, f"cache_rows {'hidden' if whole else 'cache_heads'} cache_length hidden")


def write(layer: jax.Array, new: jax.Array, used: jax.Array) -> jax.Array:
    """Enters the keys or values of T new tokens, `[B, T, K, head_dim]`, from column `used` on."""
    new = new.astype(layer.dtype).transpose(0, 2, 1, 3)
    return jax.lax.dynamic_update_slice(layer, new, (0, 0, used, 0))


def attend_cached(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: Array,
    scale: jax.Array | float | None = None, softcap: float | None = None,
) -> jax.Array:  # fmt: skip
    """`attention.attend` to one layer of a cache, without a gradient.

    Args:
      query: `[B, T, H, head_dim]`.
      keys: `[B, K, S, head_dim]`; each serves H / K query heads.
      values: `[B, K, S, head_dim]`.
      mask: bool `[B, 1, T, S]`.
      scale: of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: they stay.

    Returns:
      `[B, T, H, head_dim]`; the softmax is computed in float32.
    """
    rows, new, heads, width = query.shape
    kind, groups = query.dtype, heads // keys.shape[1]
    scale = width**-0.5 if scale is None else scale
    query = (query * scale).astype(kind).reshape(rows, new, -1, groups, width)
    # The heads of a group and the new tokens are the rows of one matrix.
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, -1, groups * new, width)
    scores = jnp.einsum(
        "bkgd,bksd->bkgs", query, keys.astype(kind), preferred_element_type=jnp.float32
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    seen = jnp.tile(mask, (1, 1, groups, 1))
    scores = jnp.where(seen, scores, MASKED_SCORE)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkgs,bksd->bkgd", weights.astype(kind), values.astype(kind),
        preferred_element_type=jnp.float32,
    )  # fmt: skip
    out = (out / total).astype(kind).reshape(rows, -1, groups, new, width)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, new, heads, width)
