"""Figures by source: the same sums as of the whole batch, for the tokens or pairs of one source.

metrics |= by_source("nll", nll, batch.loss_mask, batch.source_ids, sources)
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxalign.masked import as_bool, weighted
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


def source_of_sequences(tokens: TokenBatch, count: int | None) -> Array | None:
    """The source of each sequence: `[B]`, or, of packed rows, `[B, count]`; None if not recorded.

    Args:
      tokens: rows; all tokens of a segment are of one source.
      count: S, segments of a packed row at most; None: one sequence a row.
    """
    if tokens.source_ids is None:
        return None
    ids = jnp.asarray(tokens.source_ids)
    if count is None:
        return jnp.max(ids, axis=1)
    segments = jnp.asarray(tokens.segment_ids)[:, None, :]
    wanted = jnp.arange(1, count + 1, dtype=segments.dtype)[None, :, None]
    return jnp.max(jnp.where(segments == wanted, ids[:, None, :], 0), axis=2)
