"""Several short answers in one row: an update then costs what its tokens cost, not the padding.

A rollout has a row of P + R columns for every answer, whatever its length. Laid end to end, each
with its prompt as a segment of its own, answers keep their positions, see only themselves and
train the same tokens: loss, gradient and metrics are those of the rows as they were.

Every shape is compiled once, so few of them are used: the sizes 1/n, 2/n, … of the unpacked batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, RolloutBatch


class Layout(NamedTuple):
    """Where the positions of packed rows come from; all `[rows, length]`.

    Attributes:
      row: int32, of the rollout.
      column: int32, of the rollout.
      segment_ids: int32, 1, 2, … for the answers of a row, 0 where nothing stands.
    """

    row: np.ndarray
    column: np.ndarray
    segment_ids: np.ndarray


def packed_shape(rows: int, length: int, part: int, sizes: int, multiple: int) -> tuple[int, int]:
    """Rows and columns of a packed batch that is `part / sizes` of `rows × length`.

    Rows become about one to two times as long, and a multiple of 8; their number is a multiple of
    `multiple`.
    """
    fewer = 2 ** (math.floor(math.log2(sizes / part)) + 1)
    count = math.ceil(rows / fewer / multiple) * multiple
    return count, math.ceil(rows * length * part / sizes / count / 8) * 8


def lay_out(
    kept: np.ndarray, which: Sequence[int], *, sizes: int, multiple: int = 1
) -> Layout | None:
    """Packs rows of a rollout into the smallest of a few shapes that takes them.

    Args:
      kept: bool `[B, T]`, the tokens of each row: prompt and answer.
      which: the rows to pack.
      sizes: how many shapes there may be; the largest is the rows as they are.
      multiple: the number of packed rows is a multiple of this.

    Returns:
      The layout; None where no smaller shape takes them.
    """
    from jaxalign.data.packing import best_fit  # the data room is heavy; steps run without it

    counts = kept[np.asarray(which)].sum(1)
    full = [row for row, count in zip(which, counts, strict=True) if count]
    lengths = counts[counts > 0].tolist()
    for part in range(1, sizes):
        rows, length = packed_shape(len(which), kept.shape[1], part, sizes, multiple)
        if rows * length >= len(which) * kept.shape[1]:
            return None
        if max(lengths, default=0) > length or sum(lengths) > rows * length:
            continue

        groups = best_fit(lengths, length)
        if len(groups) <= rows:
            return _lay(kept, [[full[i] for i in group] for group in groups], rows, length)
    return None


def _lay(kept: np.ndarray, groups: list[list[int]], rows: int, length: int) -> Layout:
    layout = Layout(*(np.zeros((rows, length), np.int32) for _ in Layout._fields))
    for row, group in enumerate(groups):
        start = 0
        for segment, answer in enumerate(group, start=1):
            columns = np.flatnonzero(kept[answer])
            here = slice(start, start + len(columns))
            layout.row[row, here] = answer
            layout.column[row, here] = columns
            layout.segment_ids[row, here] = segment
            start = here.stop
    return layout


def without_answers(rollout: RolloutBatch) -> RolloutBatch:
    """The rollout less what an answer has once: rows need not be answers any more."""
    if rollout.ptx is not None:
        raise ValueError("a rollout with ptx rows cannot be packed: add them to what comes out")
    return rollout._replace(
        scores=None, scaled_scores=None, reward_parts=None, finished=None, valid=None
    )


@jax.jit
def pack_rows(rollout: RolloutBatch, layout: Layout) -> RolloutBatch:
    """The rollout's rows laid out anew; `rollout` as `without_answers` gives it."""
    there = jnp.asarray(layout.segment_ids) > 0

    def take(x: Array) -> jax.Array:
        if jnp.ndim(x) == 1:  # the same in every row
            return jnp.broadcast_to(x[:1], there.shape[:1])
        return jnp.where(there, x[layout.row, layout.column], jnp.zeros((), x.dtype))

    packed = jax.tree.map(take, rollout)
    return packed._replace(tokens=packed.tokens._replace(segment_ids=layout.segment_ids))
