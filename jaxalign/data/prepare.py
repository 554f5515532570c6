"""From rows to documents ready to pack: read, filter, tokenise, filter by length, truncate.

The steps are the same for all algorithms, whether all data is prepared at the start or one window
at a time. A `Recipe` holds what differs.
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

_CHUNK = 1024  # examples tokenised at a time: bounds offsets' memory, and paces the bar
_BAR_AFTER = 10.0  # seconds of tokenising after which its progress is shown

Sides = list[list[Encoded | None]]
Group = Sequence[int | Piece]


class Made(NamedTuple):
    """One encoded result of an example, which may have several.

    Attributes:
      example: its index among the encoded examples.
      documents: its sides: one, both of a pair, or all answers to a prompt.
      marks: per-token marks of the only side, or None.
    """

    example: int
    documents: Sequence[Encoded]
    marks: np.ndarray | None = None


class Recipe(NamedTuple):
    """What differs between kinds of batches.

    Attributes:
      name: the name of the function that users call.
      read: (row, columns, form) → its example.
      encode: examples → their encoded results, in order.
      build: (kept, groups, options, width, slots) → this host's rows.
      prompts: whether documents are prompts, in which nothing is trained.
      shared: whether both sides of a pair share one row, with one copy of their prompt.
      notes: returns lines to print about what was found while encoding.
    """

    name: str
    read: Callable[..., Any]
    encode: Callable[[Sequence[Any]], list[Made]]
    build: Callable[[Kept, Sequence[Group], Options, int, int], Any]
    prompts: bool = False
    shared: bool = False
    notes: Callable[[], list[str]] = list


class Kept(NamedTuple):
    """The data that was kept.

    Attributes:
      examples: the rows as read.
      sides: their documents, one list per side; None where an example has fewer sides.
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
      recipe: its `read` makes an example from a row.
      entry: the source.
      options: the user's options; `on_error` decides what to do with bad rows.

    Attributes:
      usage: how the source's columns were used, in the rows read so far.
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
        """The number of rows read so far, including bad rows."""
        return self._faults.read

    def skip(self, rows: int) -> None:
        """Skips rows that were already counted."""
        while self.rows < rows and next(self._rows, None) is not None:
            pass
        self._counted = Counter(self._faults.dropped)

    def take(self, rows: int | None, counts: Counts) -> list[Any] | None:
        """The examples of the next `rows` rows (None: of all rows); returns None at the end.

        Raises:
          ValueError: a source that cannot be read; a bad row, unless `on_error` drops it.
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
    """Filters, tokenises and truncates examples, and counts them.

    Args:
      recipe: the kind of batch.
      examples: the examples as read.
      sources: the index of each example's entry.
      entries: the data's sources.
      options: the user's options.
      tok: the tokenizer, for its beginning-of-text token.
      counts: the counts to add to.
      choosing: whether this is all the data: sources with a number of rows then give that many of
        the filtered rows, and it is an error if nothing is kept.
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
      recipe: the kind of batch.
      kept: the data that was kept.
      which: the examples to pack.
      options: the user's options.
      most: the most pairs in a row; None: any number.
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
    """Rows of pieces, numbered by example, and the tokens of each row."""
    named = [[p._replace(document=which[p.document]) for p in row] for row in rows]
    return list(named), [sum(p.end - p.start for p in row) for row in named]


def nothing_left(
    recipe: Recipe, options: Options, counts: Counts, lengths: Sequence[int] = ()
) -> str:
    """The error message for data of which all rows were dropped."""
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
    """Selects the configured number of rows from sources that have one."""
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
    """Encodes some examples; those that cannot be encoded are dropped if `on_error` allows it."""
    try:
        yield from recipe.encode([examples[i] for i in which])
    except RowError:
        if options.on_error == "stop":
            raise
        for number, i in enumerate(which):  # one by one, to find the faulty ones
            try:
                found = recipe.encode([examples[i]])
            except RowError as error:
                counts.drop(entries[sources[i]].name, error.reason)
            else:
                yield from (made._replace(example=number) for made in found)


class _Fitted(NamedTuple):
    """Kept documents, or the reason why they were dropped."""

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
    if options.packing == "wrapped":  # nothing is too long if documents are cut at the ends of rows
        return _Fitted(longest, None, documents)
    if options.packing == "best_fit_split":  # nor if documents continue in other rows
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
    """Starts of chunks, with a progress bar if they take long."""
    starts = range(0, size, _CHUNK)
    if len(starts) < 2:
        yield from starts
        return
    from tqdm import tqdm

    with tqdm(total=size, desc=f"{name}: tokens", unit=" rows", delay=_BAR_AFTER) as bar:
        for start in starts:
            yield start
            bar.update(min(_CHUNK, size - start))
