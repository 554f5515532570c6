"""From rows to documents that can be laid out: read, filter, tokenise, filter by length, fit.

What happens to rows is the same for all algorithms, and the same whether all data is prepared at
the start or a window at a time; a `Recipe` says what differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from jaxalign.data.branches import shared_size
from jaxalign.data.chat import Encoded
from jaxalign.data.counts import Counts
from jaxalign.data.examples import RowError, Text
from jaxalign.data.faults import Faults, OnError, read_examples
from jaxalign.data.filters import sift
from jaxalign.data.fit import fit, fit_prompt, to_last_answer
from jaxalign.data.mixture import Entry, choose
from jaxalign.data.options import Options
from jaxalign.data.packing import Piece, best_fit, best_fit_split, wrapped
from jaxalign.data.usage import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 1024  # examples tokenised at once: bounds the memory of offsets, and paces the bar
_BAR_AFTER = 10.0  # seconds of tokenising after which its progress is shown

Sides = list[list[Encoded | None]]
Group = Sequence[int | Piece]


class Made(NamedTuple):
    """What an example becomes, or one of several things.

    Attributes:
      example: its place among those that were encoded.
      documents: its sides: one, both of a pair, or all answers to a prompt.
      marks: per-token marks of the only side, or None.
    """

    example: int
    documents: Sequence[Encoded]
    marks: np.ndarray | None = None


class Recipe(NamedTuple):
    """What differs from one kind of batch to the next.

    Attributes:
      name: of the function that users call.
      read: (row, columns, form) → its example.
      encode: examples → what they become, in their order.
      build: (kept, groups, options, width, slots) → the rows of this host.
      prompts: documents are prompts, of which nothing is trained.
      shared: both sides of a pair stand in one row, with one copy of their prompt.
      notes: lines on what was found while encoding.
    """

    name: str
    read: Callable[..., Any]
    encode: Callable[[Sequence[Any]], list[Made]]
    build: Callable[[Kept, Sequence[Group], Options, int, int], Any]
    prompts: bool = False
    shared: bool = False
    notes: Callable[[], list[str]] = list


class Kept(NamedTuple):
    """What is left of the data.

    Attributes:
      examples: the rows as read.
      sides: their documents, one list a side; None where an example has fewer.
      sources: int32, the source of each.
      marks: per-token marks of each, or None.
    """

    examples: list[Any]
    sides: Sides
    sources: np.ndarray
    marks: list[np.ndarray] | None

    def lengths(self) -> list[list[int]]:
        """Tokens of the documents of each example."""
        return [
            [len(document.ids) for document in each if document is not None]
            for each in zip(*self.sides, strict=True)
        ]


class SourceReader:
    """The examples of a source, row by row, counted.

    Args:
      recipe: whose `read` makes examples of a row.
      entry: the source.
      options: of the user: `on_error` says what to do with bad rows.

    Attributes:
      usage: what became of the source's columns, in the rows read so far.
    """

    def __init__(self, recipe: Recipe, entry: Entry, options: Options):
        self._faults = Faults(cast("OnError", options.on_error))
        self._entry = entry
        self.usage = Usage(entry.name)
        self._rows = read_examples(
            entry.what,
            recipe.read,
            columns=entry.options.columns,
            form=entry.options.form,
            faults=self._faults,
            on_read=self.usage,
        )
        self._counted: Counter[str] = Counter()

    @property
    def rows(self) -> int:
        """Rows read so far, bad ones too."""
        return self._faults.read

    def skip(self, rows: int) -> None:
        """Skips rows that were counted before."""
        while self.rows < rows and next(self._rows, None) is not None:
            pass
        self._counted = Counter(self._faults.dropped)

    def take(self, rows: int | None, counts: Counts) -> list[Any] | None:
        """The examples of the next rows (None: of all); None at the end.

        Raises:
          ValueError: a source that cannot be read; a bad row, unless it is to be dropped.
        """
        examples: list[Any] = []
        before = self.rows
        for example in self._rows:
            examples.append(example)
            if rows is not None and self.rows - before >= rows:
                break
        name = self._entry.name
        counts.add(name, "read", self.rows - before)
        dropped = Counter(self._faults.dropped)
        for reason, number in (dropped - self._counted).items():
            counts.drop(name, reason, number)
        self._counted = dropped
        return examples if self.rows > before else None


def prepare(
    recipe: Recipe,
    examples: Sequence[Any],
    sources: Sequence[int],
    entries: Sequence[Entry],
    options: Options,
    tok: PreTrainedTokenizerBase,
    counts: Counts,
    *,
    choosing: bool = True,
) -> Kept:
    """Sifts, tokenises and fits examples, and counts.

    Args:
      recipe: what they become.
      examples: as read.
      sources: the entry of each.
      entries: of the data.
      options: of the user.
      tok: the tokenizer, for its beginning-of-text token.
      counts: is added to.
      choosing: all data is there: sources with a number of rows give that many of what is sifted,
        and it is an error if nothing is kept.
    """
    stay = _sifted(examples, sources, entries, options, counts)
    if choosing:
        stay = _chosen(stay, sources, entries, options, counts)
    bos = tok.bos_token_id
    kept: list[int] = []
    sides: Sides = []
    marks: list[np.ndarray] = []
    lengths: list[int] = []
    for at in _chunks(len(stay), recipe.name):
        which = stay[at : at + _CHUNK]
        before = -1
        for made in _encoded(recipe, examples, which, sources, entries, options, counts):
            i = which[made.example]
            name = entries[sources[i]].name
            counts.add(name, "added", int(made.example == before))
            before = made.example
            fitted = _fitted(recipe, made, options, bos)
            lengths.append(fitted.longest)
            if fitted.reason is not None:
                counts.drop(name, fitted.reason)
                continue
            while len(sides) < len(fitted.documents):
                sides.append([None] * len(kept))
            for number, side in enumerate(sides):
                there = number < len(fitted.documents)
                side.append(fitted.documents[number] if there else None)
            if made.marks is not None:
                marks += fitted.marks
            kept.append(i)
            counts.add(name, "kept")
            counts.add(name, "cut", int(fitted.cut))
            _count_tokens(counts, name, fitted.documents, recipe.shared)
    if not kept and choosing:
        raise ValueError(nothing_left(recipe, options, counts, lengths))
    return Kept(
        [examples[i] for i in kept],
        sides,
        np.asarray([sources[i] for i in kept], np.int32),
        marks if marks else None,
    )


def grouped(
    recipe: Recipe, kept: Kept, which: Sequence[int], options: Options, most: int | None = None
) -> tuple[list[Group], list[int]]:
    """Which examples share a row, and the tokens of each row.

    Args:
      recipe: of the batches.
      kept: what is left of the data.
      which: the examples to lay out.
      options: of the user.
      most: pairs that a row may hold; None: any number.
    """
    lengths = kept.lengths()
    if recipe.shared:
        chosen, rejected = kept.sides
        sizes = [shared_size(chosen[i], rejected[i]) for i in which]  # type: ignore[arg-type]
    else:
        sizes = [max(lengths[i]) for i in which]
    if options.packing is None:
        return [[i] for i in which], sizes
    if options.packing == "wrapped":
        for i in which:
            if not isinstance(kept.examples[i], Text):
                raise ValueError(
                    f"packing: got 'wrapped' with {kept.examples[i].origin}, which is no plain "
                    "text: an answer would be cut from its prompt; use 'best_fit'"
                )
        return _of_pieces(wrapped(sizes, options.length), which)
    if options.packing == "best_fit_split":
        return _of_pieces(best_fit_split(sizes, options.length), which)
    rows = best_fit(sizes, options.length, most)
    return (
        [[which[member] for member in row] for row in rows],
        [sum(sizes[member] for member in row) for row in rows],
    )


def _of_pieces(
    rows: Sequence[Sequence[Piece]], which: Sequence[int]
) -> tuple[list[Group], list[int]]:
    """Rows of pieces with the examples' own numbers, and the tokens of each row."""
    named = [[p._replace(document=which[p.document]) for p in row] for row in rows]
    return list(named), [sum(p.end - p.start for p in row) for row in named]


def nothing_left(
    recipe: Recipe, options: Options, counts: Counts, lengths: Sequence[int] = ()
) -> str:
    """The message of an error: all rows were dropped."""
    stats = counts.stats(())
    ordered = sorted(lengths)
    summary = ""
    if ordered:
        middle = ordered[len(ordered) // 2]
        summary = f"; the documents have {ordered[0]} to {ordered[-1]} tokens, median {middle}"
    return (
        f"{recipe.name}: no row is left to train on (loss masks all False): {stats['read']} read, "
        f"dropped {stats['dropped']}{summary}, length is {options.length}; give a larger length, "
        "or correct what the reasons name"
    )


def _sifted(
    examples: Sequence[Any],
    sources: Sequence[int],
    entries: Sequence[Entry],
    options: Options,
    counts: Counts,
) -> list[int]:
    stay, dropped = sift(examples, options)
    for i, reason in dropped.items():
        counts.drop(entries[sources[i]].name, reason)
    return stay


def _chosen(
    stay: Sequence[int],
    sources: Sequence[int],
    entries: Sequence[Entry],
    options: Options,
    counts: Counts,
) -> list[int]:
    """Of sources with a number of rows, that many."""
    by_source: dict[int, list[int]] = {}
    for i in stay:
        by_source.setdefault(sources[i], []).append(i)
    chosen: list[int] = []
    for number, mine in by_source.items():
        entry = entries[number]
        wanted = entry.options.rows
        if wanted is None:
            chosen += mine
            continue
        drawn = choose(len(mine), wanted, (options.seed, number))
        left = len(mine) - len(set(drawn))
        if left:
            counts.drop(entry.name, f"not among the {wanted} rows to be used", left)
        counts.add(entry.name, "repeated", len(drawn) - len(set(drawn)))
        chosen += [mine[i] for i in drawn]
    return chosen


def _encoded(
    recipe: Recipe,
    examples: Sequence[Any],
    which: Sequence[int],
    sources: Sequence[int],
    entries: Sequence[Entry],
    options: Options,
    counts: Counts,
) -> Iterator[Made]:
    """What some examples become; those that cannot be encoded are dropped if they may be."""
    try:
        yield from recipe.encode([examples[i] for i in which])
    except RowError:
        if options.on_error == "stop":
            raise
        for number, i in enumerate(which):  # one by one, to tell which these are
            try:
                found = recipe.encode([examples[i]])
            except RowError as error:
                counts.drop(entries[sources[i]].name, error.reason)
            else:
                yield from (made._replace(example=number) for made in found)


class _Fitted(NamedTuple):
    """Documents that were kept, or why they were not."""

    longest: int
    reason: str | None = None
    documents: Sequence[Encoded] = ()
    marks: Sequence[np.ndarray] = ()
    cut: bool = False


def _fitted(recipe: Recipe, made: Made, options: Options, bos: int | None) -> _Fitted:
    documents = made.documents
    if not recipe.prompts:
        documents = [to_last_answer(document) for document in documents]
    longest = max(len(document.ids) for document in documents)
    reason = _wrong_length(longest, options)
    if reason is not None:
        return _Fitted(longest, reason)
    keep = options.keep
    if keep is None:
        keep = "prompt_end" if recipe.prompts else "answer_start"
    if recipe.prompts:
        ids = fit_prompt(documents[0].ids, options.length, keep, bos)
        if isinstance(ids, str):
            return _Fitted(longest, ids)
        document = Encoded(ids, np.zeros(len(ids), np.bool_))
        return _Fitted(longest, None, [document], cut=len(ids) < longest)
    if options.packing == "wrapped":  # nothing is too long for rows at whose ends it is cut
        return _Fitted(longest, None, documents)
    if options.packing == "best_fit_split":  # nor for rows that go on in others
        trains = all(document.trained[1:].any() for document in documents)
        return _Fitted(longest, None if trains else "no token to train", documents)
    marks = () if made.marks is None else [made.marks]
    result = fit(documents, options.length, keep, bos=bos, shared=recipe.shared, marks=marks)
    if isinstance(result, str):
        return _Fitted(longest, result)
    return _Fitted(longest, None, *result)


def _wrong_length(tokens: int, options: Options) -> str | None:
    if tokens < options.min_tokens:
        return f"fewer than {options.min_tokens} tokens"
    if options.max_tokens is not None and tokens > options.max_tokens:
        return f"more than {options.max_tokens} tokens"
    return None


def _count_tokens(counts: Counts, source: str, documents: Sequence[Encoded], shared: bool) -> None:
    tokens = sum(len(document.ids) for document in documents)
    if shared:
        once = shared_size(*documents)
        counts.add(source, "saved", tokens - once)
        tokens = once
    counts.add(source, "tokens", tokens)
    counts.add(source, "trained", sum(int(d.trained[1:].sum()) for d in documents))


def _chunks(size: int, name: str) -> Iterator[int]:
    """Starts of chunks; a bar on the terminal when they take long."""
    starts = range(0, size, _CHUNK)
    if len(starts) < 2:
        yield from starts
        return
    from tqdm import tqdm

    with tqdm(total=size, desc=f"{name}: tokens", unit=" rows", delay=_BAR_AFTER) as bar:
        for start in starts:
            yield start
            bar.update(min(_CHUNK, size - start))
