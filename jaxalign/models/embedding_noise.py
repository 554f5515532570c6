"""Uniform noise for embeddings, generated on the devices from one seed per token."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxalign.types import EmbeddingNoise


def draw_noise(noise: EmbeddingNoise, width: int) -> jax.Array:
    """The noise of a batch, float32 `[B, T, D]`: uniform in ± scale / √D.

    A token's numbers depend only on its own seed, not on its place in the batch.

    Args:
      noise: seeds and scales.
      width: D.
    """

    def token(seed: jax.Array) -> jax.Array:
        key = jax.random.key(seed, impl="threefry2x32")  # the same on every platform
        return jax.random.uniform(key, (width,), jnp.float32, -1.0, 1.0)

    draws = jax.vmap(jax.vmap(token))(jnp.asarray(noise.seeds))
    return draws * (jnp.asarray(noise.scale) / math.sqrt(width))[..., None]
