"""Packs documents into rows: which documents share a row (best fit), and the arrays of a row.

A document of n tokens takes n positions of a row:

    ids           p0 p1 p2 a0 a1 e          (a and e are trained)
    inputs        p0 p1 p2 a0 a1 e  .  .
    targets       p1 p2 a0 a1 e  .  .  .
    loss_mask      0  0  1  1  1 0  0  0
    positions      0  1  2  3  4 5  0  0
    segment_ids    1  1  1  1  1 1  0  0    (the next document of the row: 2)
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.data.chat import Encoded
from jaxalign.types import PromptBatch, TokenBatch


class Piece(NamedTuple):
    """Part of a document: its tokens from `start` up to `end`."""

    document: int
    start: int
    end: int


def best_fit(lengths: Sequence[int], capacity: int, most: int | None = None) -> list[list[int]]:
    """Packs documents into rows by best-fit decreasing.

    The longest document comes first; each goes into the row that it leaves with the least space.
    Documents of equal length keep their order. The result is deterministic, with at most 11/9 of
    the optimal number of rows plus one (Johnson et al., 1974).

    Args:
      lengths: the number of tokens of each document, in [1, capacity].
      capacity: tokens that fit into a row.
      most: the most documents in a row; None: any number.

    Returns:
      The documents of each row, as indices into `lengths`.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(
            f"lengths: got {sizes.min()} to {sizes.max()}, wanted 1 to capacity = {capacity}; "
            "cut longer documents before packing"
        )
    rows: list[list[int]] = []
    open_rows: dict[int, list[int]] = {}  # free space -> rows
    spaces: list[int] = []  # the keys of open_rows, sorted
    for document in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[document])
        at = bisect.bisect_left(spaces, size)
        if at == len(spaces):
            row, space = len(rows), capacity
            rows.append([])
        else:
            space = spaces[at]
            row = open_rows[space].pop(0)
            if not open_rows[space]:
                del open_rows[space], spaces[at]
        rows[row].append(document)
        space -= size
        if space and len(rows[row]) != most:
            if space not in open_rows:
                open_rows[space] = []
                bisect.insort(spaces, space)
            open_rows[space].append(row)
    return rows


def wrapped(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Packs plain texts by concatenating them and cutting where a row ends.

    Every row except the last is full. A document that is cut continues in the next row as a
    separate segment, which does not attend to the first part. Its first token there is still a
    target of the previous row, so that only the first token of each document is not trained.

    Args:
      lengths: tokens of each document, at least 1.
      capacity: tokens that fit into a row.

    Returns:
      The pieces of each row, in order.
    """
    rows: list[list[Piece]] = []
    free = 0
    for document, size in enumerate(lengths):
        if size < 1:
            raise ValueError(f"lengths[{document}]: got {size}, wanted at least 1")
        start = 0
        while start < size:
            if free == 0:
                rows.append([])
                free = capacity
            end = min(size, start + free)
            rows[-1].append(Piece(document, start, end))
            free -= end - start
            start = end
    return rows


def best_fit_split(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """Packs by best fit, after splitting documents longer than a row into pieces of a full row.

    Only documents that are too long are split. A piece is a separate segment that does not attend
    to earlier pieces; its last token has the next piece's first token as its target.

    Args:
      lengths: tokens of each document, at least 1.
      capacity: tokens that fit into a row.

    Returns:
      The pieces of each row.
    """
    pieces = [
        Piece(document, start, min(start + capacity, size))
        for document, size in enumerate(lengths)
        for start in range(0, size, capacity)
    ]
    rows = best_fit([piece.end - piece.start for piece in pieces], capacity)
    return [[pieces[i] for i in row] for row in rows]


def token_rows(
    documents: Sequence[Encoded] | Mapping[int, Encoded],
    groups: Sequence[Sequence[int | Piece]],
    rows: int,
    length: int,
    pad_id: int,
    sources: Sequence[int] | Mapping[int, int] | np.ndarray | None = None,
) -> TokenBatch:
    """Lays documents into rows, padded on the right.

    Args:
      documents: documents by number.
      groups: the documents, or pieces of them, in each row, in order; any further rows stay empty.
        The last token of a piece has the document's next one as its target.
      rows: B.
      length: T; every group fits.
      pad_id: the id on padding. Masks do not depend on it.
      sources: the source of each document, for `source_ids`; None leaves them out.

    Returns:
      A TokenBatch of numpy arrays `[rows, length]`.
    """
    inputs = np.full((rows, length), pad_id, np.int32)
    targets = np.full((rows, length), pad_id, np.int32)
    positions = np.zeros((rows, length), np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    loss_mask = np.zeros((rows, length), np.bool_)
    source_ids = None if sources is None else np.zeros((rows, length), np.int32)
    counting = np.arange(length, dtype=np.int32)
    for row, group in enumerate(groups):
        start = 0
        for segment, member in enumerate(group, start=1):
            document, first, last = member if isinstance(member, tuple) else (member, 0, None)
            ids, trained = documents[document]
            ids, next_ids, next_trained = ids[first:last], ids[first + 1 :], trained[first + 1 :]
            end = start + len(ids)
            known = min(len(next_ids), len(ids))
            inputs[row, start:end] = ids
            targets[row, start : start + known] = next_ids[:known]
            positions[row, start:end] = counting[: len(ids)]
            segment_ids[row, start:end] = segment
            loss_mask[row, start : start + known] = next_trained[:known]
            if source_ids is not None and sources is not None:
                source_ids[row, start:end] = sources[document]
            start = end
    return TokenBatch(inputs, targets, positions, segment_ids, loss_mask, source_ids=source_ids)


def bucket(size: int) -> int:
    """Rounds a number of tokens up to one of few row widths: 32, 48, 64, 96, 128, 192, …"""
    width = 32
    while width < size:
        width = width * 3 // 2 if width & (width - 1) == 0 else width // 3 * 4
    return width


def prompt_rows(
    prompts: Sequence[np.ndarray] | Mapping[int, np.ndarray],
    which: Sequence[int],
    rows: int,
    length: int,
    pad_id: int,
) -> PromptBatch:
    """Lays prompts into rows, padded on the left.

    Args:
      prompts: token ids of prompts by number, each at most `length`.
      which: the prompt of each row; any further rows stay empty (index -1).
      rows: B.
      length: P.
      pad_id: the id on padding.
    """
    tokens = np.full((rows, length), pad_id, np.int32)
    mask = np.zeros((rows, length), np.bool_)
    index = np.full(rows, -1, np.int32)
    for row, prompt in enumerate(which):
        ids = prompts[prompt]
        tokens[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
        index[row] = prompt
    return PromptBatch(tokens, mask, index)
