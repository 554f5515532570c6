"""Random batches for a case, built on demand, as a loader would."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.commands.bench.case import Case
from jaxalign.commands.bench.sizes import SIZES
from jaxalign.data.chat import Encoded
from jaxalign.data.packing import best_fit, token_rows
from jaxalign.run.tasks.shapes import full_batch
from jaxalign.types import PairBatch, PromptBatch, TokenBatch

_BATCHES = 4
"""Distinct batches of a case, at least."""

_PROMPT_SHARE = 0.25
"""Part of the shorter side of a pair that is its prompt."""


class RandomBatches:
    """Random batches in place of `jaxalign.data.Batches`.

    Args:
      case: what they are for.
      shapes: of a batch; full rows of it are made where no layout of it is known.
    """

    examples: tuple[Any, ...] = ()
    sources: tuple[str, ...] = ()

    def __init__(self, case: Case, shapes: Any):
        self._case, self._shapes = case, shapes

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self._shapes, TokenBatch):
            return token_batches(self._case)
        if isinstance(self._shapes, PairBatch):
            return pair_batches(self._case)
        if isinstance(self._shapes, PromptBatch):
            # Answers are ragged, their prompts are not.
            return itertools.repeat(prompt_batch(dataclasses.replace(self._case, layout="full")))
        return full_batches(self._case, self._shapes)

    def close(self) -> None:
        """Does nothing."""


def full_batches(case: Case, shapes: Any) -> Iterator[Any]:
    """Batches of any kind with one document of full length per row."""
    rng, batch = np.random.default_rng(0), full_batch(shapes)

    def fill(x: Any) -> Any:
        if not isinstance(x, TokenBatch):
            return x
        *rows, length = x.inputs.shape
        ids = rng.integers(2, SIZES[case.size].vocab_size, (*rows, length + 1))
        mask = np.broadcast_to(np.arange(length) > 0, x.inputs.shape)
        return x._replace(
            inputs=ids[..., :-1].astype(np.int32), targets=ids[..., 1:].astype(np.int32),
            loss_mask=mask,
        )  # fmt: skip

    for _ in itertools.count():
        yield jax.tree.map(fill, batch, is_leaf=lambda x: isinstance(x, TokenBatch))


def token_batches(case: Case) -> Iterator[TokenBatch]:
    """Rows for SFT; every token except a document's first is trained."""
    rng = np.random.default_rng(0)
    lengths = _lengths(case, rng, 1)[:, 0]
    documents = [_document(rng, case, int(n), 0) for n in lengths]
    rows, length = case.shape
    for groups in _groups(case, lengths.tolist()):
        yield token_rows(documents, groups, rows, length, 0)


def pair_batches(case: Case) -> Iterator[PairBatch]:
    """Pairs that share a prompt of a quarter of the shorter side."""
    rng = np.random.default_rng(0)
    lengths = _lengths(case, rng, 2)
    sides: tuple[list[Encoded], list[Encoded]] = ([], [])
    for pair in lengths:
        prompt = max(1, int(pair.min() * _PROMPT_SHARE))
        start = rng.integers(2, SIZES[case.size].vocab_size, prompt).astype(np.int32)
        for side, length in zip(sides, pair, strict=True):
            document = _document(rng, case, int(length), prompt)
            document.ids[:prompt] = start
            side.append(document)
    rows, length = case.shape
    plan = _groups(case, lengths.max(1).tolist(), cycle=False)
    slots = max(len(group) for groups in plan for group in groups)
    for groups in itertools.cycle(plan):
        chosen, rejected = (token_rows(side, groups, rows, length, 0) for side in sides)
        mask = np.arange(slots)[None] < np.array([len(group) for group in groups])[:, None]
        yield PairBatch(chosen, rejected, mask=mask if case.layout == "packed" else None)


def prompt_batch(case: Case) -> PromptBatch:
    """Prompts, padded on the left if their lengths differ."""
    rng = np.random.default_rng(1)
    shape = (case.rows, case.length)
    tokens = rng.integers(2, SIZES[case.size].vocab_size, shape).astype(np.int32)
    shortest = case.length if case.layout == "full" else _shortest(case.length)
    lengths = rng.integers(shortest, case.length + 1, case.rows)
    mask = np.arange(case.length)[None] >= (case.length - lengths)[:, None]
    return PromptBatch(np.where(mask, tokens, 0), mask, np.arange(case.rows, dtype=np.int32))


def _shortest(length: int) -> int:
    return max(2, length // 8)


def _lengths(case: Case, rng: np.random.Generator, sides: int) -> np.ndarray:
    # Packed rows take more documents than there are rows.
    count = _BATCHES * case.rows * (2 if case.layout == "packed" else 1)
    shortest = case.length if case.layout == "full" else _shortest(case.length)
    return rng.integers(shortest, case.length + 1, (count, sides))


def _document(rng: np.random.Generator, case: Case, length: int, prompt: int) -> Encoded:
    ids = rng.integers(2, SIZES[case.size].vocab_size, length).astype(np.int32)
    return Encoded(ids, np.arange(length) >= prompt)


def _groups(case: Case, lengths: Sequence[int], *, cycle: bool = True):
    """Which documents the rows of each batch hold, whole batches only, over and over."""
    rows, length = case.shape
    laid = [[i] for i in range(len(lengths))]
    if case.layout == "packed":
        laid = best_fit(lengths, length)
    plan = [laid[at : at + rows] for at in range(0, len(laid) - rows + 1, rows)]
    return itertools.cycle(plan) if cycle else plan
