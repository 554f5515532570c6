"""Per-layer attributes: the window, the rotary embedding and the scale of attention scores.

All layers run in one scan. Attributes that differ between layers are scanned with their weights,
one value per layer. Attributes that do not differ are constants of the trace and cost nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention.mask import MaskSpec
from jaxalign.models.base import DecoderConfig
from jaxalign.models.rope import Rope, rope_tables

LayerAttributes = dict[str, Any]
"""`windowed`, `rotated` (bool) and `scale` (float32), where layers differ in them: `[L]`, or one
scalar of a single layer."""


class AttentionInputs(NamedTuple):
    """The inputs of one layer's attention besides its queries, keys and values.

    Attributes:
      mask: which query attends to which key.
      rope: rotation of the new tokens, or None.
      scale: the factor of the attention scores, or None for 1/√head_dim.
    """

    mask: MaskSpec
    rope: Rope | None
    scale: Any


def layer_attributes(config: DecoderConfig) -> LayerAttributes:
    """The attributes of all layers, `[L]` each, to scan with the weights.

    It is {} if all layers are alike.
    """
    attributes: LayerAttributes = {}
    if len(set(config.window_layers)) > 1:
        attributes["windowed"] = np.asarray(config.window_layers)
    if len(set(config.rope_layers)) > 1:
        attributes["rotated"] = np.asarray(config.rope_layers)
    if config.query_scale_by_layer:
        number = np.arange(1, config.num_layers + 1, dtype=np.float32)
        base = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        attributes["scale"] = np.float32(base) / number
    return attributes


def attention_inputs(
    config: DecoderConfig, mask: MaskSpec, *, matrix: bool
) -> Callable[[LayerAttributes], AttentionInputs]:
    """Prepares masks and rotations once for all layers.

    Args:
      config: the model's config.
      mask: the mask of a layer without a window.
      matrix: whether masks become matrices `[B, 1, T, S]`, once for all layers.

    Returns:
      A function from a layer's attributes to its inputs.
    """
    has_window = config.window is not None and (
        not config.window_layers or any(config.window_layers)
    )
    window_mask = dataclasses.replace(mask, window=config.window) if has_window else mask
    if matrix:
        mask, window_mask = mask.with_matrix(), window_mask.with_matrix()
    rope = window_rope = None
    if not config.learned_positions and (not config.rope_layers or any(config.rope_layers)):
        assert mask.query is not None
        positions, segments = mask.query.positions, mask.query.ids
        rope = window_rope = rope_tables(config.rope, config.head_dim, positions, segments)
        if has_window and config.local_rope is not None:
            window_rope = rope_tables(config.local_rope, config.head_dim, positions, segments)

    def of_layer(attributes: LayerAttributes) -> AttentionInputs:
        layer_mask, layer_rope = (window_mask, window_rope) if has_window else (mask, rope)
        if "windowed" in attributes:
            windowed, chosen = attributes["windowed"], None
            if matrix:  # both are [B, 1, T, S]
                chosen = jnp.where(windowed, window_mask.matrix, mask.matrix)
            layer_mask = dataclasses.replace(window_mask, windowed=windowed, matrix=chosen)
            if window_rope is not rope:
                layer_rope = jax.tree.map(
                    lambda near, far: jnp.where(windowed, near, far), window_rope, rope
                )
        if "rotated" in attributes and layer_rope is not None:
            # A layer without positions rotates by the angle 0.
            cos, sin = layer_rope  # [B, T, 1, rotated / 2]
            rotated = attributes["rotated"]
            layer_rope = jnp.where(rotated, cos, 1.0), jnp.where(rotated, sin, 0.0)
        return AttentionInputs(layer_mask, layer_rope, attributes.get("scale", config.query_scale))

    return of_layer
