"""Packs short answers into shared rows, so that an update spends less compute on padding.

A rollout has a row of P + R columns for every answer, whatever its length. In a packed row, each
answer with its prompt is a segment: it keeps its positions, attends only to itself, and trains the
same tokens. Loss, gradient and metrics equal those of the unpacked rows.

Each shape needs a compilation, so there are few shapes: 1/n, 2/n, … of the unpacked batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.types import Array, RolloutBatch


class RowPlan(NamedTuple):
    """Where each position of the packed rows comes from; all arrays are `[rows, length]`.

    Attributes:
      row: int32, the rollout's row.
      column: int32, the rollout's column.
      segment_ids: int32, 1, 2, … for the answers of a row, 0 for padding.
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


def plan_rows(
    tokens: np.ndarray, which: Sequence[int], *, sizes: int, multiple: int = 1
) -> RowPlan | None:
    """Packs rows of a rollout into the smallest of a few shapes that holds them.

    Args:
      tokens: bool `[B, T]`, the tokens of each row: prompt and answer.
      which: the rows to pack.
      sizes: how many shapes there may be; the largest is the unpacked batch.
      multiple: the number of packed rows is a multiple of this.

    Returns:
      The plan; None where no smaller shape holds them.
    """
    from jaxalign.data.packing import best_fit  # heavy; steps do not need it

    counts = tokens[np.asarray(which)].sum(1)
    full = [row for row, count in zip(which, counts, strict=True) if count]
    lengths = counts[counts > 0].tolist()
    for part in range(1, sizes):
        rows, length = packed_shape(len(which), tokens.shape[1], part, sizes, multiple)
        if rows * length >= len(which) * tokens.shape[1]:
            return None
        if max(lengths, default=0) > length or sum(lengths) > rows * length:
            continue
        groups = best_fit(lengths, length)
        if len(groups) <= rows:
            return _fill(tokens, [[full[i] for i in group] for group in groups], rows, length)
    return None


def _fill(tokens: np.ndarray, groups: list[list[int]], rows: int, length: int) -> RowPlan:
    plan = RowPlan(*(np.zeros((rows, length), np.int32) for _ in RowPlan._fields))
    for row, group in enumerate(groups):
        start = 0
        for segment, answer in enumerate(group, start=1):
            columns = np.flatnonzero(tokens[answer])
            place = slice(start, start + len(columns))
            plan.row[row, place] = answer
            plan.column[row, place] = columns
            plan.segment_ids[row, place] = segment
            start = place.stop
    return plan


def without_answers(rollout: RolloutBatch) -> RolloutBatch:
    """Drops the rollout's per-answer arrays, because packed rows hold several answers.

    Raises:
      ValueError: the rollout has `ptx` rows.
    """
    if rollout.ptx is not None:
        raise ValueError(
            "a rollout with ptx rows cannot be packed; add them to the mini-batches afterwards"
        )
    return rollout._replace(
        scores=None,
        scaled_scores=None,
        reward_parts=None,
        finished=None,
        valid=None,
        non_score_rewards=None,
    )


@jax.jit
def pack_rows(rollout: RolloutBatch, plan: RowPlan) -> RolloutBatch:
    """The rollout's rows packed by a plan; `rollout` as `without_answers` gives it."""
    real = jnp.asarray(plan.segment_ids) > 0

    def take(x: Array) -> jax.Array:
        if jnp.ndim(x) == 1:  # the same in every row
            return jnp.broadcast_to(x[:1], real.shape[:1])
        mask = jnp.expand_dims(real, range(2, x.ndim))
        return jnp.where(mask, x[plan.row, plan.column], jnp.zeros((), x.dtype))

    packed = jax.tree.map(take, rollout)
    return packed._replace(tokens=packed.tokens._replace(segment_ids=plan.segment_ids))
