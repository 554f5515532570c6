"""Packs answers into shared rows, so that a pass spends less compute on padding and on prompts.

A rollout has a row of P + R columns for every answer, whatever its length. In a packed row, each
answer with its prompt is a segment: it keeps its positions, attends only to itself, and trains the
same tokens. Loss, gradient and metrics equal those of the unpacked rows.

The answers to one prompt can also share its copy, as branches of one segment. Of the prompt `p0 p1
p2` and its answers `a0 a1` and `b0`:

    inputs        p0 p1  p2 a0 a1  p2 b0
    branch_ids     0  0   1  1  1   2  2
    positions      0  1   2  3  4   2  3

The prompt's last token is in every branch, because each answer's first token is predicted from it.

Each shape needs a compilation, so there are few shapes: 1/n, 2/n, … of the unpacked batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.parallel.sharding import all_gather_rows
from jaxalign.types import Array, RolloutBatch, TokenBatch


class RowPlan(NamedTuple):
    """Where each position of the packed rows comes from; all arrays are `[rows, length]`.

    Attributes:
      row: int32, the rollout's row.
      column: int32, the rollout's column.
      segment_ids: int32, 1, 2, … for the answers of a row (with shared prompts, for the prompts), 0
        for padding.
      branch_ids: int32, 0 for a shared prompt, 1, 2, … for its answers; None: no prompt is shared.
    """

    row: np.ndarray
    column: np.ndarray
    segment_ids: np.ndarray
    branch_ids: np.ndarray | None = None


class _Unit(NamedTuple):
    """What is packed as one segment: answers of one prompt, which they share if there are several.

    Attributes:
      answers: rows of the rollout.
      columns: how many of a row's first columns are shared.
      size: positions of the segment.
    """

    answers: list[int]
    columns: int
    size: int


def packed_shape(
    rows: int, length: int, part: int, sizes: int, multiple: int, together: int = 1
) -> tuple[int, int]:
    """Rows and columns of a packed batch that is `part / sizes` of `rows × length`.

    Rows become about one to two times as long, or, with `together > 1` answers to each prompt, long
    enough for the answers of two prompts, so that a prompt with many tokens fits beside one with
    few. Their length is a multiple of 8; their number is a multiple of `multiple`.
    """
    fewer = 2 * together if together > 1 else 2 ** (math.floor(math.log2(sizes / part)) + 1)
    count = math.ceil(rows / fewer / multiple) * multiple
    return count, math.ceil(rows * length * part / sizes / count / 8) * 8


def plan_rows(
    tokens: np.ndarray,
    which: Sequence[int],
    *,
    sizes: int,
    multiple: int = 1,
    samples: int = 1,
    start: int = 0,
) -> RowPlan | None:
    """Packs rows of a rollout into the smallest of a few shapes that holds them.

    Args:
      tokens: bool `[B, T]`, the tokens of each row: prompt and answer.
      which: the rows to pack.
      sizes: how many shapes there may be; the largest is the unpacked batch.
      multiple: the number of packed rows is a multiple of this.
      samples: so many adjacent rows of the rollout answer one prompt and share its copy; 1: none
        do.
      start: the column of the prompts' last tokens, with `samples > 1`.

    Returns:
      The plan; None where no smaller shape holds them.
    """
    from jaxalign.data.packing import best_fit  # heavy; steps do not need it

    counts = tokens.sum(1)
    prompts: dict[int, list[int]] = {}
    for row in which:
        if counts[row]:
            prompts.setdefault(row // samples if samples > 1 else row, []).append(row)
    # So many answers of a prompt are expected in a part of the rollout: the same number for all of
    # its mini-batches, which then have the same shapes.
    together = max(1, round(samples * len(which) / len(tokens)))
    for part in range(1, sizes):
        shape = packed_shape(len(which), tokens.shape[1], part, sizes, multiple, together)
        rows, length = shape
        if rows * length >= len(which) * tokens.shape[1]:
            return None
        units = [u for rest in prompts.values() for u in _units(tokens, rest, start, length)]
        lengths = [unit.size for unit in units]
        if max(lengths, default=0) > length or sum(lengths) > rows * length:
            continue
        groups = best_fit(lengths, length)
        if len(groups) <= rows:
            return _fill(tokens, [[units[i] for i in g] for g in groups], shape, samples > 1)
    return None


def tokens_and_start(tokens: TokenBatch, answers: Array) -> tuple[np.ndarray, int]:
    """What `plan_rows` needs of device arrays, which may lie on a mesh: `tokens` and `start`.

    Args:
      tokens: prompts and answers `[B, T]`.
      answers: bool `[B, T]`, where an answer's token is predicted. All answers begin in one column.
    """
    there, answered = all_gather_rows((tokens.segment_ids, answers))
    return there > 0, int(answered.any(0).argmax())


def _units(tokens: np.ndarray, answers: list[int], start: int, length: int) -> list[_Unit]:
    """One prompt's answers, in as few segments of at most `length` positions as fit in turn."""
    if len(answers) == 1:
        return [_Unit(answers, 0, int(tokens[answers[0]].sum()))]
    shared = int(tokens[answers[0], :start].sum())
    units: list[_Unit] = []
    for answer in answers:
        size = int(tokens[answer, start:].sum())
        if units and units[-1].size + size <= length:
            last = units[-1]
            units[-1] = _Unit([*last.answers, answer], start, last.size + size)
        else:
            units.append(_Unit([answer], start, shared + size))
    return units


def _fill(
    tokens: np.ndarray, groups: list[list[_Unit]], shape: tuple[int, int], branches: bool
) -> RowPlan:
    row_ids, columns_of, segment_ids, branch_ids = (np.zeros(shape, np.int32) for _ in range(4))
    for row, group in enumerate(groups):
        at = 0
        for segment, unit in enumerate(group, start=1):
            # (branch, answer, its columns): the shared prompt is taken from the first answer.
            parts = [(0, unit.answers[0], np.flatnonzero(tokens[unit.answers[0], : unit.columns]))]
            for branch, answer in enumerate(unit.answers, start=1):
                columns = np.flatnonzero(tokens[answer, unit.columns :]) + unit.columns
                parts.append((branch, answer, columns))
            for branch, answer, columns in parts:
                place = slice(at, at + len(columns))
                row_ids[row, place] = answer
                columns_of[row, place] = columns
                segment_ids[row, place] = segment
                branch_ids[row, place] = branch
                at = place.stop
    return RowPlan(row_ids, columns_of, segment_ids, branch_ids if branches else None)


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
        columns=None,
    )


@jax.jit
def pack_rows(rollout: RolloutBatch, plan: RowPlan) -> RolloutBatch:
    """The rollout's rows packed by a plan; `rollout` as `without_answers` gives it."""
    packed = take_planned(rollout, plan)
    return packed._replace(tokens=_with_ids(packed.tokens, plan))


@jax.jit
def pack_tokens(tokens: TokenBatch, plan: RowPlan) -> TokenBatch:
    """Rows `[B, T]` of prompts and answers, packed by a plan."""
    return _with_ids(take_planned(tokens, plan), plan)


def take_planned(tree: Any, plan: RowPlan) -> Any:
    """`[B, T, …]` arrays by a plan, 0 on padding."""
    real = jnp.asarray(plan.segment_ids) > 0

    def take(x: Array) -> jax.Array:
        if jnp.ndim(x) == 1:  # the same in every row
            return jnp.broadcast_to(x[:1], real.shape[:1])
        mask = jnp.expand_dims(real, range(2, x.ndim))
        return jnp.where(mask, x[plan.row, plan.column], jnp.zeros((), x.dtype))

    return jax.tree.map(take, tree)


def _with_ids(tokens: TokenBatch, plan: RowPlan) -> TokenBatch:
    return tokens._replace(segment_ids=plan.segment_ids, branch_ids=plan.branch_ids)


def unpack(x: Array, plan: RowPlan, shape: tuple[int, int]) -> jax.Array:
    """Values of packed rows at the columns that they come from: `[B, T]`, 0 elsewhere.

    A shared prompt's values are only at its first answer's columns.
    """
    real = jnp.asarray(plan.segment_ids) > 0
    row = jnp.where(real, plan.row, shape[0])  # beyond the rows: dropped
    return jnp.zeros(shape, x.dtype).at[row, plan.column].set(x, mode="drop")
