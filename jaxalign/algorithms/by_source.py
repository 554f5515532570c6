"""Figures by source: the same sums as of the whole batch, for the tokens or pairs of one source.

metrics |= by_source("nll", nll, batch.loss_mask, batch.source_ids, sources)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_bool, last_index, weighted
from jaxalign.types import Array, TokenBatch, Weighted


def by_source(
    name: str, values: Array, mask: Array, source_ids: Array | None, sources: Sequence[str]
) -> dict[str, Weighted]:
    """`{name}/{source}` for each of several sources; nothing for one, or where none is recorded.

    Args:
      name: of the metric, such as "nll".
      values: any shape; nothing flows back.
      mask: the same shape, what counts.
      source_ids: the same shape, from 0.
      sources: their names.

    Returns:
      Sums with their weights, to be added up over the batches' parts; and, so that a source that a
      batch lacks can be told from one whose mean is 0, `share/{source}`: its part of what counts.
    """
    if source_ids is None or len(sources) < 2:
        return {}
    values = jax.lax.stop_gradient(jnp.asarray(values))
    everything = jnp.sum(as_bool(mask), dtype=jnp.float32)
    metrics: dict[str, Weighted] = {}
    for number, source in enumerate(sources):
        found = weighted(values, as_bool(mask) & (jnp.asarray(source_ids) == number))
        metrics[f"{name}/{source}"] = found
        metrics[f"share/{source}"] = Weighted(found.weight, everything)
    return metrics


def source_of_sequences(tokens: TokenBatch, sequences: Array, count: int = 1) -> jax.Array | None:
    """The source of each sequence of a row, read at its end: `[B, count]`; None if not recorded.

    Args:
      tokens: rows; all tokens of a sequence are of one source.
      sequences: int `[B, T]`, which sequence a token belongs to: 0 for none, 1 … `count`.
      count: how many sequences a row has at most.
    """
    if tokens.source_ids is None:
        return None
    return jnp.take_along_axis(jnp.asarray(tokens.source_ids), last_index(sequences, count), axis=1)
