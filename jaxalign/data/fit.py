"""Truncates documents that are too long: which tokens stay, which rows are dropped, and why.

A row ends with the end token of its last answer; leaving out what a template writes after it (a
newline) is not counted as truncation. When the start of a prompt is cut, all sides of a row lose
the same tokens, so that the compared answers still follow the same prompt. The beginning-of-text
token stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign.data.chat import Encoded


class Fitted(NamedTuple):
    """The documents of a row that was kept.

    Attributes:
      documents: the documents to train on.
      marks: per-token arrays, truncated in the same places.
      cut: whether any token was removed.
    """

    documents: list[Encoded]
    marks: list[np.ndarray]
    cut: bool


def fit(
    documents: Sequence[Encoded],
    length: int,
    keep: str,
    *,
    bos: int | None = None,
    shared: bool = False,
    marks: Sequence[np.ndarray] = (),
) -> Fitted | str:
    """Cuts the documents of one row to `length`.

    Args:
      documents: the sides of a row (one side, both of a pair, or all answers to a prompt).
      length: the positions available to each side, or, if `shared`, to both sides of a pair
        together, with their common prompt stored once.
      keep: as `Options.keep`, not None. A fully trained document (plain text) has no prompt: it
        keeps its start, unless `keep` is "whole".
      bos: id of the beginning-of-text token; a document that starts with it keeps it.
      shared: see `length`.
      marks: one array per document (or none), aligned with its tokens.

    Returns:
      The kept documents, or why the row is dropped. Nothing predicts the first token of a row, so a
      row needs a trained token after it.
    """
    documents = [to_last_answer(document) for document in documents]
    if not all(document.trained[1:].any() for document in documents):
        return "no token to train"
    prefix = branch_point(documents) if shared else 0
    sizes = [len(document.ids) for document in documents]
    marks = [mark[:size] for mark, size in zip(marks, sizes, strict=False)]
    cost = sum(sizes) - prefix if shared else max(sizes)
    if cost <= length:
        return Fitted(documents, marks, cut=False)
    if keep == "whole":
        return f"longer than {length} tokens"
    if keep == "prompt_end" and not any(document.trained[0] for document in documents):
        return _without_prompt_start(documents, marks, cost - length, length, bos)
    limit = length
    if shared:
        limit = prefix + _longest_side([size - prefix for size in sizes], length - prefix)
    return _without_answer_end(documents, marks, limit, length)


def _without_prompt_start(
    documents: Sequence[Encoded],
    marks: Sequence[np.ndarray],
    excess: int,
    length: int,
    bos: int | None,
) -> Fitted | str:
    """Removes the same `excess` tokens from the start of all prompts, after a common bos token."""
    with_bos = bos is not None and all(document.ids[0] == bos for document in documents)
    if excess + with_bos >= min(_last_answer(document) for document in documents):
        return f"the answer alone is longer than {length} tokens"
    kept = []
    # A document that has the bos token keeps it, even if the other side has none.
    starts = [int(bos is not None and document.ids[0] == bos) for document in documents]
    for document, start in zip(documents, starts, strict=True):
        trained = _whole_turns(document.trained, start + excess)
        kept.append(Encoded(*(_without(x, start, excess) for x in (document.ids, trained))))
    kept_marks = [_without(mark, start, excess) for mark, start in zip(marks, starts, strict=False)]
    return Fitted(kept, kept_marks, cut=True)


def _without_answer_end(
    documents: Sequence[Encoded], marks: Sequence[np.ndarray], limit: int, length: int
) -> Fitted | str:
    """Cuts each document to its first `limit` tokens."""
    kept = [Encoded(document.ids[:limit], document.trained[:limit]) for document in documents]
    if not all(document.trained[1:].any() for document in kept):
        return f"the answer begins beyond {length} tokens"
    return Fitted(kept, [mark[:limit] for mark in marks], cut=True)


def fit_prompt(ids: np.ndarray, length: int, keep: str, bos: int | None) -> np.ndarray | str:
    """Cuts a prompt to its last `length` tokens, keeping a beginning-of-text token in front."""
    if len(ids) <= length:
        return ids
    if keep == "whole":
        return f"longer than {length} tokens"
    start = 1 if bos is not None and ids[0] == bos else 0
    return _without(ids, start, len(ids) - length)


def branch_point(documents: Sequence[Encoded]) -> int:
    """How many tokens the two sides of a pair can share in one row.

    It is their common prefix, up to at most the token before either side's first trained token.
    That token must be on both sides, because it predicts the first token of each answer.
    """
    chosen, rejected = documents
    size = min(len(chosen.ids), len(rejected.ids))
    differ = np.flatnonzero(chosen.ids[:size] != rejected.ids[:size])
    common = int(differ[0]) if differ.size else size
    for document in documents:
        trained = np.flatnonzero(document.trained[1:])
        if trained.size:
            common = min(common, int(trained[0]) + 1)
    return max(common - 1, 0)


def to_last_answer(document: Encoded) -> Encoded:
    """Leaves out what a template writes after the last answer, such as a newline.

    A rollout ends with its stop token, so a reward model must learn to read its score there.
    """
    if document.trained.size and document.trained[-1]:
        return document
    trained = np.flatnonzero(document.trained)
    if not trained.size:
        return document
    end = int(trained[-1]) + 1
    return Encoded(document.ids[:end], document.trained[:end])


def _without(x: np.ndarray, start: int, count: int) -> np.ndarray:
    """`x` without the `count` entries after the first `start`."""
    return np.concatenate([x[:start], x[start + count :]])


def _whole_turns(trained: np.ndarray, first: int) -> np.ndarray:
    """An answer that loses its start becomes context: the rest of it is not trained."""
    if first == 0 or not (trained[first] and trained[first - 1]):
        return trained
    trained = trained.copy()
    rest = np.flatnonzero(~trained[first:])
    trained[first : first + int(rest[0]) if rest.size else len(trained)] = False
    return trained


def _last_answer(document: Encoded) -> int:
    """The index at which the last run of trained tokens begins."""
    trained = np.flatnonzero(document.trained)
    breaks = np.flatnonzero(np.diff(trained) > 1)
    return int(trained[breaks[-1] + 1 if breaks.size else 0])


def _longest_side(sizes: Sequence[int], room: int) -> int:
    """The largest L for which the sides, cut to L each, fit together."""
    short, long = sorted(sizes)
    return room // 2 if 2 * short >= room else min(room - short, long)
