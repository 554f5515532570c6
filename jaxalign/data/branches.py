"""Rows in which both answers of a pair follow one copy of their prompt.

A prompt `p0 p1 p2`, a chosen answer `c0 e`, a rejected answer `r0 r1 e`:

    inputs        p0 p1  p2 c0 e  p2 r0 r1 e
    targets       p1 p2  c0 e  .  r0 r1 e  .
    branch_ids     0  0   1  1  1  2  2  2  2
    positions      0  1   2  3  4  2  3  4  5
    segment_ids    1  1   1  1  1  1  1  1  1   (the next pair of the row: 2)
    loss_mask      0  0   1  1  0  1  1  1  0

The prompt's last token is in both branches because each answer's first token is predicted from it.
The shared part is the common prefix of the *token ids*: if the two sides tokenize the prompt
differently, less of it is shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxalign.data.chat import Encoded
from jaxalign.data.fit import branch_point
from jaxalign.types import TokenBatch


def shared_size(chosen: Encoded, rejected: Encoded) -> int:
    """The number of positions that a pair takes when its prompt is stored once."""
    return len(chosen.ids) + len(rejected.ids) - branch_point((chosen, rejected))


def shared_rows(
    chosen: Sequence[Encoded],
    rejected: Sequence[Encoded],
    groups: Sequence[Sequence[int]],
    rows: int,
    length: int,
    pad_id: int,
    sources: Sequence[int] | np.ndarray | None = None,
) -> TokenBatch:
    """Lays pairs into rows, padded on the right; arguments as `packing.token_rows`.

    Returns:
      A TokenBatch of numpy arrays `[rows, length]`, with `branch_ids`.
    """
    inputs = np.full((rows, length), pad_id, np.int32)
    targets = np.full((rows, length), pad_id, np.int32)
    positions = np.zeros((rows, length), np.int32)
    segment_ids = np.zeros((rows, length), np.int32)
    branch_ids = np.zeros((rows, length), np.int32)
    source_ids = None if sources is None else np.zeros((rows, length), np.int32)
    loss_mask = np.zeros((rows, length), np.bool_)
    for row, group in enumerate(groups):
        at = 0
        for segment, pair in enumerate(group, start=1):
            sides = (chosen[pair], rejected[pair])
            apart = branch_point(sides)
            begin = at
            for branch, (document, first, last) in enumerate(
                [(sides[0], 0, apart), *((side, apart, len(side.ids)) for side in sides)]
            ):
                end = at + last - first
                known = min(last, len(document.ids) - 1) - first
                inputs[row, at:end] = document.ids[first:last]
                targets[row, at : at + known] = document.ids[first + 1 : first + 1 + known]
                loss_mask[row, at : at + known] = document.trained[first + 1 : first + 1 + known]
                positions[row, at:end] = np.arange(first, last)
                branch_ids[row, at:end] = branch
                at = end
            segment_ids[row, begin:at] = segment
            if source_ids is not None and sources is not None:
                source_ids[row, begin:at] = sources[pair]
    return TokenBatch(inputs, targets, positions, segment_ids, loss_mask, branch_ids, source_ids)
