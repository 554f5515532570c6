"""Hidden states above the layers that training leaves alone, and which models share them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from jaxalign.models.adapters import without_adapters
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.types import LowerStates, Params, TokenBatch


def lower_states(model: Any, params: Params, tokens: TokenBatch) -> LowerStates:
    """The lower states of a batch, for `read` as its `lower`; see `Decoder.lower_states`.

    Args:
      model: a `Decoder` or `Scorer`.
      params: its parameters.
      tokens: the batch, `[B, T]`.
    """
    decoder = model.base if isinstance(model, Scorer) else model
    rows = (tokens.inputs, tokens.positions, tokens.segment_ids, tokens.branch_ids)
    return decoder.lower_states(params, *rows)


def same_lower_layers(model: Any, params: Params, other: Any, other_params: Params) -> bool:
    """Whether another model's lower layers are a model's own: of one shape, and the same arrays.

    Copies of the arrays don't count, nor do models of other classes. A step that is compiled by
    `compile_step` returns the frozen arrays themselves; under a plain `jax.jit` they are copies.

    Args:
      model: a `Decoder` or `Scorer` with `frozen_layers`.
      params: all of its parameters, trained and frozen.
      other: the other model, with adapters in the same layers, or without.
      other_params: all of its parameters.
    """
    plain = [_plain(model), _plain(other)]
    if None in plain or plain[0] != plain[1]:
        return False
    if getattr(other, "frozen_layers", 0) not in (0, model.frozen_layers):
        return False
    arrays = [
        jax.tree.leaves([without_adapters(x[name]) for name in ("embed", "blocks")])
        for x in (params, other_params)
    ]
    return len(arrays[0]) == len(arrays[1]) and all(a is b for a, b in zip(*arrays, strict=True))


def _plain(model: Any) -> Decoder | None:
    """The decoder without adapters, and without what does not change its results."""
    model = model.base if isinstance(model, Scorer) else model
    if not isinstance(model, Decoder):
        return None
    return dataclasses.replace(model, lora=None, remat="none")
