"""Rotary positions, attention masks that respect documents, and the attention function."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.base import RopeConfig
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
    """

    keys: jax.Array
    values: jax.Array
    segment_ids: jax.Array
    used: jax.Array


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequencies `[head_dim / 2]` in radians a position, float32."""
    freqs = 1.0 / config.theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    if config.kind == "linear":
        freqs = freqs / config.factor
    elif config.kind == "llama3":
        # Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, linear in
        # context/wavelength between.
        wavelength = 2 * math.pi / freqs
        turns = config.original_max_positions / wavelength
        keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        freqs = keep * freqs + (1 - keep) * freqs / config.factor
    return freqs.astype(np.float32)


def rope_tables(config: RopeConfig, head_dim: int, positions: Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines `[B, T, 1, head_dim / 2]` of the rotation at each position, float32."""
    angles = jnp.asarray(positions, jnp.float32)[..., None, None] * jnp.reshape(
        rope_frequencies(config, head_dim), (1, 1, 1, -1)
    )
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `[B, T, heads, head_dim]` in the half-split form used by Hugging Face weights."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def causal_mask(segment_ids: Array) -> jax.Array:
    """Which token sees which: `[B, 1, T, T]` bool, earlier or same column and same segment."""
    segment_ids = jnp.asarray(segment_ids)
    length = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))[None]
    return (same & causal)[:, None]


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


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention `softmax(q·kᵀ / √head_dim) · v` with grouped key and value heads.

    Args:
      query: `[B, T, H, head_dim]`.
      key: `[B, S, K, head_dim]`; each serves H / K query heads.
      value: `[B, S, K, head_dim]`.
      mask: bool `[B, 1, T, S]`. A row without any True (padding) gets a meaningless finite value.

    Returns:
      `[B, T, H, head_dim]`; the softmax is computed in float32.
    """
    rows, new, heads, width = query.shape
    shared = key.shape[2]
    # The query heads of a group are stacked along the rows of one matrix, so that both products
    # are plain batched matrix products without repeated keys. On CPUs this is about twice as fast
    # as the general contraction of jax.nn.dot_product_attention for narrow heads.
    query = (query * width**-0.5).reshape(rows, new, shared, -1, width)
    query = query.transpose(0, 2, 3, 1, 4).reshape(rows, shared, -1, width)
    scores = jnp.matmul(
        query, key.transpose(0, 2, 3, 1), preferred_element_type=jnp.float32
    ).reshape(rows, shared, -1, new, key.shape[1])
    scores = jnp.where(mask[:, :, None], scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(rows, shared, -1, key.shape[1])
    out = jnp.matmul(weights, value.transpose(0, 2, 1, 3))
    out = out.reshape(rows, shared, -1, new, width).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, new, heads, width)
