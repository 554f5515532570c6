"""From token ids to the residual stream."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.models.adapters import adapted_rows, adapter_of
from jaxalign.models.base import DecoderConfig, LoraConfig
from jaxalign.models.embedding_noise import draw_noise
from jaxalign.models.ops import look_up
from jaxalign.parallel.sharding import constrain
from jaxalign.types import Array, EmbeddingNoise, Params


def embed_tokens(
    config: DecoderConfig, lora: LoraConfig | None, embed: Params, inputs: Array, positions: Array,
    segment_ids: Array, *, axes: str, dtype: str, noise: EmbeddingNoise | None = None,
) -> jax.Array:  # fmt: skip
    """Token ids `[B, T]` → the residual stream `[B, T, D]`.

    Args:
      config: the model's config.
      lora: options of adapters, or None.
      embed: parameters of the embedding.
      inputs, positions, segment_ids: int `[B, T]`; segment 0 is padding.
      axes: the logical axes of the result, e.g. "rows length hidden".
      dtype: of the result.
      noise: added before `embed_scale`, or None.
    """
    inputs = jnp.asarray(inputs)
    x = look_up(embed["embedding"], inputs, axes.split()[1])
    adapter = adapter_of(lora, "embed")
    if adapter is not None:
        x = adapted_rows(x, inputs, embed["embedding"], embed, adapter.scales[0])
    if config.learned_positions:
        # A position beyond the table gives NaN, which is noticed, unlike a wrong embedding. Padding
        # may hold any position.
        known = jnp.where(jnp.asarray(segment_ids) > 0, jnp.asarray(positions), 0)
        place = jnp.take(embed["positions"], known, axis=0, mode="fill", fill_value=jnp.nan)
        # Two rows of bfloat16 are added in float32 and rounded once.
        x = x.astype(jnp.float32) + place.astype(jnp.float32)
    if noise is not None:
        x = x.astype(jnp.float32) + draw_noise(noise, x.shape[-1])
    x = x.astype(dtype)
    if config.embed_scale != 1:
        x = x * jnp.asarray(config.embed_scale, x.dtype)
    return constrain(x, axes)
