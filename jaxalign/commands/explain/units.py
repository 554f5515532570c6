"""The units (documents, pairs, answers) of a batch, and a batch in which one unit counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.pairs import layout
from jaxalign.types import (
    Array,
    GradedBatch,
    PairBatch,
    RankedBatch,
    SharedPairBatch,
    StepBatch,
    TokenBatch,
    UnpairedBatch,
)

Unit = tuple[int, int]
"""(row, segment from 1) of a document, pair, ranking or answer."""


class Document(NamedTuple):
    """A sequence of tokens as a model read it.

    Attributes:
      name: "chosen" or "rejected" of a pair, the rank of a ranked answer, "" otherwise.
      ids: `[n]`.
      trained: bool `[n]`, which tokens are learned as targets.
      values: name → float `[n]`; NaN where a token has none.
    """

    name: str
    ids: np.ndarray
    trained: np.ndarray
    values: dict[str, np.ndarray]


def read_rows(batch: Any) -> TokenBatch:
    """The rows of a batch that the model reads, `[R, T]`."""
    if isinstance(batch, PairBatch | SharedPairBatch):
        return layout(batch).tokens
    if isinstance(batch, RankedBatch):
        return jax.tree.map(lambda x: jnp.reshape(x, (-1, x.shape[-1])), batch.answers)
    return batch if isinstance(batch, TokenBatch) else batch.tokens


def units_of(batch: Any) -> list[Unit]:
    """The units of a batch on the host, row by row, in the order of `Batches.rows_of`."""
    if isinstance(batch, PairBatch) and batch.mask is None:
        chosen, rejected = (np.asarray(s.loss_mask) for s in (batch.chosen, batch.rejected))
        exists = chosen.any(axis=1) & rejected.any(axis=1)
        return [(int(row), 1) for row in np.flatnonzero(exists)]
    if isinstance(batch, PairBatch | SharedPairBatch):
        places = np.argwhere(np.asarray(batch.mask))
        return [(int(row), int(slot) + 1) for row, slot in places]
    if isinstance(batch, RankedBatch):
        return [(int(row), 1) for row in np.flatnonzero(np.asarray(batch.mask).any(axis=1))]
    segments = np.asarray(read_rows(batch).segment_ids)
    return [
        (row, segment)
        for row, last in enumerate(segments.max(axis=1, initial=0).tolist())
        for segment in range(1, last + 1)
    ]


def only(batch: Any, row: Array, segment: Array) -> Any:
    """The batch with only one unit that counts; shapes do not change, so it works under `jit`."""

    def of_rows(mask: Array) -> jax.Array:
        mask = jnp.asarray(mask)
        here = jnp.arange(mask.shape[0]) == row
        return mask & here.reshape((-1,) + (1,) * (mask.ndim - 1))

    def of_tokens(tokens: TokenBatch) -> TokenBatch:
        mask = of_rows(tokens.loss_mask) & (jnp.asarray(tokens.segment_ids) == segment)
        return tokens._replace(loss_mask=mask)

    def of_slots(mask: Array | None) -> jax.Array | None:
        if mask is None:
            return None
        slots = jnp.arange(jnp.shape(mask)[1])[None, :] == segment - 1
        return of_rows(mask) & slots

    if isinstance(batch, PairBatch):
        chosen, rejected = of_tokens(batch.chosen), of_tokens(batch.rejected)
        return batch._replace(chosen=chosen, rejected=rejected, mask=of_slots(batch.mask))
    if isinstance(batch, SharedPairBatch):
        return batch._replace(tokens=of_tokens(batch.tokens), mask=of_slots(batch.mask))
    if isinstance(batch, UnpairedBatch):
        return batch._replace(tokens=of_tokens(batch.tokens))
    if isinstance(batch, RankedBatch | GradedBatch | StepBatch):
        return batch._replace(mask=of_rows(batch.mask))
    raise TypeError(f"no units of a {type(batch).__name__}")


def documents_of(
    batch: Any, unit: Unit, tokens: TokenBatch, values: dict[str, np.ndarray], *, targets: bool
) -> list[Document]:
    """The documents of a unit, with the values of their tokens.

    Args:
      batch: on the host.
      unit: one of its units.
      tokens: its `read_rows`, on the host.
      values: name → `[R, T]`.
      targets: whether values belong to the targets at their positions, otherwise to the inputs.
    """
    found = []
    tokens = jax.tree.map(np.asarray, tokens)
    for name, row, here in _places(batch, unit, tokens):
        at = np.flatnonzero(here)
        ids = np.asarray(tokens.inputs[row][at])
        masks = np.asarray(tokens.loss_mask[row][at], bool)
        columns = {key: np.asarray(value[row][at], np.float64) for key, value in values.items()}
        if masks.size and masks[-1]:  # cut document: the next piece's token
            ids = np.append(ids, tokens.targets[row][at[-1]])
            masks = np.append(masks, False)
            columns = {key: np.append(value, np.nan) for key, value in columns.items()}
        trained = np.append(False, masks[:-1])
        if targets:
            columns = {
                key: np.where(trained, np.append(np.nan, value[:-1]), np.nan)
                for key, value in columns.items()
            }
        found.append(Document(name, ids, trained, columns))
    return found


def _places(batch: Any, unit: Unit, tokens: TokenBatch) -> Iterator[tuple[str, int, np.ndarray]]:
    """(name, row of `tokens`, bool `[T]`) of each document of a unit."""
    row, segment = unit
    mine = np.asarray(tokens.segment_ids) == segment
    if isinstance(batch, PairBatch):
        for side, name in enumerate(("chosen", "rejected")):  # they are interleaved
            yield name, 2 * row + side, mine[2 * row + side]
    elif isinstance(batch, SharedPairBatch):
        here = mine[row]
        branches = np.asarray(tokens.branch_ids)[row]
        for branch, name in enumerate(("chosen", "rejected"), start=1):
            yield name, row, here & ((branches == 0) | (branches == branch))
    elif isinstance(batch, RankedBatch):
        answers = np.asarray(batch.mask).shape[1]
        for number in np.flatnonzero(np.asarray(batch.mask)[row]).tolist():
            place = row * answers + number
            rank = float(np.asarray(batch.ranks)[row, number])
            yield f"rank {rank:g}", place, mine[place]
    else:
        yield "", row, mine[row]
