"""Rotary positions: the frequencies of each kind of scaling, and the rotation."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.backend import backend
from jaxalign.models.base import RopeConfig
from jaxalign.types import Array

Rope = tuple[jax.Array, jax.Array]
"""Cosines and sines `[B, T, 1, rotated / 2]`, float32."""


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular frequencies `[rotated / 2]` in radians per position, float32.

    - "default": `theta^(-2i/rotated)`.
    - "linear": all frequencies divided by `factor`.
    - "llama3": low frequencies divided by `factor`, high ones unchanged, linear in
      context/wavelength between them.
    - "yarn" (Peng et al. 2023, https://arxiv.org/abs/2309.00071): the same, but linear in the
      dimension between them.
    - "dynamic", "longrope": the frequencies for documents within the original context; see
      `rope_tables`.
    """
    width = config.width(head_dim)
    freqs = 1.0 / config.theta ** (np.arange(0, width, 2, dtype=np.float32) / width)
    if config.kind == "linear":
        freqs = freqs / config.factor
    elif config.kind == "llama3":
        wavelength = 2 * math.pi / freqs
        turns = config.original_max_positions / wavelength
        keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        freqs = keep * freqs + (1 - keep) * freqs / config.factor
    elif config.kind == "yarn":
        low, high = _yarn_ramp(config, width)
        keep = 1 - np.clip((np.arange(width // 2) - low) / (high - low), 0.0, 1.0)
        freqs = keep * freqs + (1 - keep) * freqs / config.factor
    elif config.kind == "longrope":
        freqs = freqs / np.asarray(config.short_factors, np.float32)
    return freqs.astype(np.float32)


def _yarn_ramp(config: RopeConfig, width: int) -> tuple[float, float]:
    """The dimensions between which frequencies change from unscaled to scaled."""

    def dimension(turns: float) -> float:
        context = config.original_max_positions / (turns * 2 * math.pi)
        return width * math.log(context) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high if high != low else high + 0.001


def rope_scale(config: RopeConfig) -> float:
    """The factor of cosines and sines: more than 1 for yarn and longrope."""
    if config.kind not in ("yarn", "longrope"):
        return 1.0
    if config.attention_factor is not None:
        return config.attention_factor
    if config.factor <= 1:
        return 1.0
    if config.kind == "longrope":
        return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_positions))
    log = 0.1 * math.log(config.factor)
    if config.mscale and config.mscale_all_dim:
        return (config.mscale * log + 1) / (config.mscale_all_dim * log + 1)
    return log + 1


def rope_tables(
    config: RopeConfig, head_dim: int, positions: Array, segment_ids: Array | None = None
) -> Rope:
    """The rotation at each position.

    Two kinds depend on the length of a document. This is the number of its own tokens, not the
    length of its row or (as in transformers) of the longest row in the batch, so that packing and
    padding change nothing:

    - "dynamic" (NTK): in a document of n > `original_max_positions` = m positions, theta becomes
      `theta · (factor · n / m − factor + 1)^(d / (d − 2))`, where d is the rotated width.
    - "longrope" (Ding et al. 2024, https://arxiv.org/abs/2402.13753): frequencies are divided by
      `long_factors` instead of `short_factors` if n > m.

    While decoding, a document's length is only known up to its newest token. When n grows beyond m,
    cached keys keep their rotation, as in transformers, so the result differs from one pass over
    the whole document.

    Args:
      config: the rotary embedding.
      head_dim: the width of a head.
      positions: int `[B, T]`.
      segment_ids: int `[B, T]`, equal for the tokens of one document; None: a row is one document.
    """
    positions = jnp.asarray(positions)
    lengths = None
    if config.kind in ("dynamic", "longrope"):
        lengths = _lengths(positions, segment_ids)
    mesh = jax.sharding.get_abstract_mesh()
    one_device = mesh.empty or mesh.size == 1
    if backend().rope_in_branch and one_device:
        return _tables_in_branch(config, head_dim, positions, lengths)
    return _tables(config, head_dim, positions, lengths)


def _tables(
    config: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array | None
) -> Rope:
    freqs = jnp.reshape(rope_frequencies(config, head_dim), (1, 1, 1, -1))
    if lengths is not None:
        freqs = _by_length(config, head_dim, freqs, lengths)
    angles = positions.astype(jnp.float32)[..., None, None] * freqs
    scale = rope_scale(config)
    if scale == 1:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def _tables_in_branch(
    config: RopeConfig, head_dim: int, positions: jax.Array, lengths: jax.Array | None
) -> Rope:
    """`_tables` inside a `lax.cond` whose predicate is always true, so that they are computed once.

    Otherwise XLA's CPU compiler fuses sines and cosines into each rotation and recomputes them for
    every layer and head; it removes an `optimization_barrier` before fusion. XLA does not fuse
    across a `cond` with an unknown predicate. (`Backend.rope_in_branch` has the figures.)
    """
    # True for every position, read as int32: an unsigned type has no value below 0 to compare with.
    # Comparing in the positions' own type once gave False, and rotations of zero.
    always = positions.reshape(-1)[0].astype(jnp.int32) > jnp.iinfo(jnp.int32).min
    tables = functools.partial(_tables, config, head_dim)
    shapes = jax.eval_shape(tables, positions, lengths)

    def never(positions: jax.Array, lengths: jax.Array | None) -> Rope:
        cos, sin = (jnp.zeros(x.shape, x.dtype) for x in shapes)
        return cos, sin

    return jax.lax.cond(always, tables, never, positions, lengths)


def _lengths(positions: jax.Array, segment_ids: Array | None) -> jax.Array:
    """The number of positions in each token's document, `[B, T]`."""
    if segment_ids is None:
        return jnp.broadcast_to(jnp.max(positions, axis=1, keepdims=True) + 1, positions.shape)
    segment_ids = jnp.asarray(segment_ids)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=2) + 1


def _by_length(
    config: RopeConfig, head_dim: int, freqs: jax.Array, lengths: jax.Array
) -> jax.Array:
    """Frequencies `[B, T, 1, rotated / 2]` for tokens of documents of these lengths."""
    longer = (lengths > config.original_max_positions)[..., None, None]
    if config.kind == "longrope":
        ratio = np.asarray(config.short_factors) / np.asarray(config.long_factors)
        return jnp.where(longer, freqs * ratio.astype(np.float32)[None, None, None], freqs)
    width = config.width(head_dim)
    original = config.original_max_positions
    stretch = config.factor * lengths.astype(jnp.float32) / original - (config.factor - 1)
    stretch = jnp.where(longer, stretch[..., None, None], 1.0)
    # theta' ^ (-2i/d) = theta ^ (-2i/d) · stretch ^ (-2i/(d − 2))
    exponents = np.arange(0, width, 2, dtype=np.float32) / max(width - 2, 1)
    return freqs * stretch ** -exponents[None, None, None]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates `[B, T, heads, head_dim]` in the half-split form used by Hugging Face weights.

    If the tables are narrower than half a head, only the head's first dimensions are rotated.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return jnp.concatenate([rotate(x[..., :width], cos, sin), x[..., width:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
