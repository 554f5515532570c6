"""What differs from layer to layer: window or not, which rotation, how attention is scaled.

All layers run in one scan. What differs is one value a layer, scanned along with the weights; what
does not differ is settled while tracing and costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention import window_mask
from jaxalign.models.base import DecoderConfig
from jaxalign.models.rope import Rope, rope_tables
from jaxalign.types import Array

Traits = dict[str, Any]
"""Of each layer, or of one of them: `windowed`, `rotated` (bool) and `scale` (float32)."""


class View(NamedTuple):
    """How one layer looks at the tokens.

    Attributes:
      mask: bool `[B, 1, T, S]`, which token sees which.
      rope: rotation of the new tokens, or None.
      scale: of the attention scores, or None for the default.
    """

    mask: jax.Array
    rope: Rope | None
    scale: Any


def layer_traits(config: DecoderConfig) -> Traits:
    """What the scan over layers carries beside their weights: `[L]` each, {} if all are alike."""
    traits: Traits = {}
    if len(set(config.window_layers)) > 1:
        traits["windowed"] = np.asarray(config.window_layers)
    if len(set(config.rope_layers)) > 1:
        traits["rotated"] = np.asarray(config.rope_layers)
    if config.query_scale_by_layer:
        number = np.arange(1, config.num_layers + 1, dtype=np.float32)
        base = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
        traits["scale"] = np.float32(base) / number
    return traits


def make_views(
    config: DecoderConfig, mask: jax.Array, positions: Array, segment_ids: Array, seen: Any
) -> Callable[[Traits], View]:
    """Lays out all that layers choose from, and returns the choice.

    Args:
      config: of the model.
      mask: bool `[B, 1, T, S]`, which token sees which where no window holds.
      positions: int `[B, T]` of the new tokens.
      segment_ids: int `[B, T]` of the new tokens.
      seen: int `[B, S]`, positions of what they look at; unused without a window.

    Returns:
      traits of a layer → its view.
    """
    windowed = config.window is not None and (not config.window_layers or any(config.window_layers))
    near = mask
    if windowed and config.window is not None:
        near = mask & window_mask(positions, seen, config.window)
    rope = local = None
    if not config.learned_positions and (not config.rope_layers or any(config.rope_layers)):
        rope = local = rope_tables(config.rope, config.head_dim, positions, segment_ids)
        if windowed and config.local_rope is not None:
            local = rope_tables(config.local_rope, config.head_dim, positions, segment_ids)

    def view(trait: Traits) -> View:
        seen_by, turn = (near, local) if windowed else (mask, rope)
        if "windowed" in trait:
            seen_by = jnp.where(trait["windowed"], near, mask)
            if local is not rope:
                turn = jax.tree.map(lambda a, b: jnp.where(trait["windowed"], a, b), local, rope)
        if "rotated" in trait and turn is not None:
            # A layer without positions turns by the angle 0.
            cos, sin = turn
            turn = jnp.where(trait["rotated"], cos, 1.0), jnp.where(trait["rotated"], sin, 0.0)
        scale = trait.get("scale", config.query_scale)
        return View(seen_by, turn, scale)

    return view
