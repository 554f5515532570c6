"""Whole rows of tokens in the form for the layers: padded, in order or in zigzag order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.dispatch import AttentionKind
from jaxalign.models.attention.exchange import choose_exchange
from jaxalign.models.attention.kernels import zigzag_multiple
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.backend import backend, record_choice
from jaxalign.models.base import DecoderConfig
from jaxalign.models.per_layer import AttentionInputs, LayerAttributes, attention_inputs
from jaxalign.parallel.rules import current_sequence_attention
from jaxalign.parallel.shard_map import pad_length
from jaxalign.parallel.sharding import axis_shards
from jaxalign.parallel.zigzag import to_zigzag
from jaxalign.types import Array


class Rows(NamedTuple):
    """Whole rows as the layers take them.

    Attributes:
      inputs: `[B, T]`, padded to the shards of the length.
      segments: the tokens' segments.
      of_layer: maps a layer's attributes to its attention inputs.
      kind: the kind of attention.
      zigzag: whether the tokens are in zigzag order.
    """

    inputs: jax.Array
    segments: Segments
    of_layer: Callable[[LayerAttributes], AttentionInputs]
    kind: str
    zigzag: bool


def segments_of(
    inputs: Array, positions: Array | None, segment_ids: Array | None, branch_ids: Array | None
) -> Segments:
    """The segments of rows `[B, T]`; by default each row is one document from position 0."""
    shape = jnp.shape(inputs)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
    if segment_ids is None:
        segment_ids = jnp.ones(shape, jnp.result_type(inputs))
    return Segments(segment_ids, positions, branch_ids)


def pad_to_shards(inputs: Array, segments: Segments) -> tuple[jax.Array, Segments]:
    """Tokens and segments, padded at the end to a multiple of the shards of the length."""
    return jax.tree.map(lambda x: pad_length(jnp.asarray(x)), (inputs, segments))


def like_rows(values: Array, length: int, zigzag: bool) -> jax.Array:
    """Per-token values `[B, T, …]` in the order of the rows that `layer_rows` made."""
    values = jnp.asarray(values)
    pad = ((0, 0), (0, length - values.shape[1]), *(((0, 0),) * (values.ndim - 2)))
    values = jnp.pad(values, pad)
    return to_zigzag(values) if zigzag else values


def layer_rows(
    config: DecoderConfig, dtype: str, choice: AttentionKind, inputs: jax.Array,
    segments: Segments, *, balance: bool,
) -> Rows:  # fmt: skip
    """Whole rows as the layers take them.

    Args:
      config: the model's config.
      dtype: of activations.
      choice: the kind of attention.
      inputs: `[B, T]`, padded to the shards of the length.
      segments: the tokens' segments.
      balance: whether tokens may be put in zigzag order.
    """
    rows, length = segments.ids.shape
    record_choice(f"attention of {length:,} tokens: {choice}")
    kind, exchange = choice.kind, "gather"
    if axis_shards("length") > 1:
        asked = current_sequence_attention()
        how = choose_exchange(asked, kind, config, rows, length, dtype)
        record_choice(f"parts of {length:,} tokens: {how}")
        exchange = how.kind
    multiple = zigzag_multiple(kind, length, exchange) if balance else None
    if multiple is not None:
        pad = ((0, 0), (0, -length % multiple))
        padded = jax.tree.map(lambda x: jnp.pad(x, pad), (inputs, segments))
        inputs, segments = jax.tree.map(to_zigzag, padded)
    short = length <= backend().attention_mask_length and axis_shards("length") == 1
    matrix = kind == "xla" and short
    mask = MaskSpec(segments, segments, zigzag=multiple is not None, exchange=exchange)
    of_layer = attention_inputs(config, mask, matrix=matrix)
    return Rows(inputs, segments, of_layer, kind, multiple is not None)
