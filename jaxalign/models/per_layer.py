"""What differs from layer to layer: window or not, which rotation, how attention is scaled.

All layers run in one scan. What differs is one value a layer, scanned along with the weights; what
does not differ is settled while tracing and costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention.mask import Sight
from jaxalign.models.base import DecoderConfig
from jaxalign.models.rope import Rope, rope_tables

Traits = dict[str, Any]
"""Of each layer, or of one of them: `windowed`, `rotated` (bool) and `scale` (float32)."""


class View(NamedTuple):
    """How one layer looks at the tokens.

    Attributes:
      sight: which token sees which.
      rope: rotation of the new tokens, or None.
      scale: of the attention scores, or None for the default.
    """

    sight: Sight
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


def make_views(config: DecoderConfig, sight: Sight, *, matrix: bool) -> Callable[[Traits], View]:
    """Lays out all that layers choose from, and returns the choice.

    Args:
      config: of the model.
      sight: which token sees which where no window holds.
      matrix: whether who sees whom is laid out as a matrix, once for all layers.

    Returns:
      traits of a layer → its view.
    """
    windowed = config.window is not None and (not config.window_layers or any(config.window_layers))
    near = dataclasses.replace(sight, window=config.window) if windowed else sight
    if matrix:
        sight, near = sight.with_matrix(), near.with_matrix()
    rope = local = None
    if not config.learned_positions and (not config.rope_layers or any(config.rope_layers)):
        marks = sight.looking
        positions, segments = marks.positions, marks.segments
        rope = local = rope_tables(config.rope, config.head_dim, positions, segments)
        if windowed and config.local_rope is not None:
            local = rope_tables(config.local_rope, config.head_dim, positions, segments)

    def view(trait: Traits) -> View:
        seen_by, turn = (near, local) if windowed else (sight, rope)
        if "windowed" in trait:
            chosen = None
            if matrix:
                chosen = jnp.where(trait["windowed"], near.matrix, sight.matrix)
            seen_by = dataclasses.replace(near, windowed=trait["windowed"], matrix=chosen)
            if local is not rope:
                turn = jax.tree.map(lambda a, b: jnp.where(trait["windowed"], a, b), local, rope)
        if "rotated" in trait and turn is not None:
            # A layer without positions turns by the angle 0.
            cos, sin = turn
            turn = jnp.where(trait["rotated"], cos, 1.0), jnp.where(trait["rotated"], sin, 0.0)
        scale = trait.get("scale", config.query_scale)
        return View(seen_by, turn, scale)

    return view
