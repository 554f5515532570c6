"""Metrics by data source: the loss's sums again, over the tokens or pairs of each source alone.

loss = by_source(loss, ("chat", "code"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.algorithms.loss import Entries, Figures, HiddenLoss, Terms
from jaxalign.losses.masked import as_bool, last_index, weighted
from jaxalign.types import Array, Params, TokenBatch, Weighted


def by_source(loss: HiddenLoss, names: Sequence[str]) -> HiddenLoss:
    """Adds metrics for each of several data sources to a loss.

    Args:
      loss: a loss that returns `Terms.entries`.
      names: the sources' names, in the order of the rows' `source_ids`. With fewer than two names
        the loss is returned unchanged.
    """
    if len(names) < 2:
        return loss

    def terms(params: Params, hidden: jax.Array, batch: Any) -> Terms:
        result = loss.terms(params, hidden, batch)
        return result._replace(metrics=result.metrics | figures_by_source(result.entries, names))

    return loss._replace(terms=terms)


def figures_by_source(entries: Entries | None, names: Sequence[str]) -> Figures:
    """`{term}/{source}` for each source; empty if sources are not recorded.

    Returns:
      Sums with their weights. Also `share/{source}`, the source's share of the entries that count:
      it distinguishes a missing source from one whose mean is 0.
    """
    if entries is None or entries.source_ids is None:
        return {}
    mask, source_ids = as_bool(entries.mask), jnp.asarray(entries.source_ids)
    everything = weighted(mask, mask, entries.weights).weight
    figures: Figures = {}
    for number, source in enumerate(names):
        figure = weighted(entries.losses, mask & (source_ids == number), entries.weights)
        figures[f"{entries.name}/{source}"] = figure
        figures[f"share/{source}"] = Weighted(figure.weight, everything)
    return figures


def source_of_sequences(tokens: TokenBatch, sequences: Array, count: int = 1) -> jax.Array | None:
    """The data source of each sequence of a row: `[B, count]`; None if not recorded.

    Args:
      tokens: rows; all tokens of a sequence come from one source.
      sequences: int `[B, T]`, which sequence a token belongs to: 0 for none, 1 … `count`.
      count: the largest number of sequences in a row.
    """
    if tokens.source_ids is None:
        return None
    return jnp.take_along_axis(jnp.asarray(tokens.source_ids), last_index(sequences, count), axis=1)


def source_of_rows(tokens: TokenBatch) -> jax.Array | None:
    """The data source of each row, if a row is one sequence: `[B]`; None if not recorded."""
    source = source_of_sequences(tokens, tokens.segment_ids)
    return None if source is None else source[:, 0]
