"""Batches from data that is read during training (streaming).

Sources are read one window of rows at a time. A window is read, tokenised, packed and shuffled
independently, so that it can be rebuilt from its first row. A position is therefore the window's
first row and the number of its rows used so far. Memory holds one window and the prefetched
batches.

Sources without weights are read one after the other; sources with weights each repeat forever, and
take turns in proportion.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

from jaxalign.data.chat import resolve_chat_template
from jaxalign.data.counts import Counts
from jaxalign.data.loader import Batches, count_rows
from jaxalign.data.mixture import Entry, pools_of
from jaxalign.data.options import Options, settings_of
from jaxalign.data.prepare import Group, Kept, Recipe, SourceReader, grouped, nothing_left, prepare
from jaxalign.data.usage import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AHEAD = 16  # the minimum number of prefetched batches, so that the next window is ready in time
_LEAST_PAIR = 32  # tokens per pair, to estimate how many pairs fit into a packed row


class _Row(NamedTuple):
    """A row before it is built: its window and its documents."""

    kept: Kept
    group: Group


def streamed(
    recipe: Recipe, entries: Sequence[Entry], options: Options, tok: PreTrainedTokenizerBase
) -> Batches[Any]:
    """`loader.in_memory`, but for data that does not fit in memory."""
    for entry in entries:
        if entry.options.epochs is not None:
            raise ValueError(
                f"epochs: got {entry.options.epochs} for {entry.name!r} when streaming, wanted "
                "none; give all sources weights, with epochs=None for the whole"
            )
    if entries[0].options.weight is not None and options.epochs is not None:
        raise ValueError(
            f"epochs: got {options.epochs}, wanted None when sources with weights are streamed: "
            "they come round at different times; give a number of steps instead"
        )
    slots = max(1, options.length // _LEAST_PAIR)
    usages: dict[str, Usage] = {}
    slots = slots if options.packing is not None else 1
    data = _Stream(recipe, entries, options, tok, slots, usages)
    ahead = max(options.prefetch, _AHEAD) if options.prefetch else 0
    return Batches(
        recipe.name,
        options,
        [entry.name for entry in entries],
        grain.experimental.ThreadPrefetchIterDataset(data, prefetch_buffer_size=ahead),
        length=None,
        checksum=_checksum(recipe, entries, options, tok),
        counts=None,
        examples=[],
        usage=lambda: [*map(str, list(usages.values())), *recipe.notes()],
    )


class _Stream(grain.IterDataset):
    """Batches, one after the other."""

    def __init__(self, *arguments: Any):
        super().__init__()
        self._arguments = arguments

    def __iter__(self) -> grain.DatasetIterator:
        return _Batcher(*self._arguments)


class _Batcher(grain.DatasetIterator):
    """Takes rows from the lanes in turn, and counts them."""

    def __init__(
        self,
        recipe: Recipe,
        entries: Sequence[Entry],
        options: Options,
        tok: PreTrainedTokenizerBase,
        slots: int,
        usages: dict[str, Usage],
    ):
        super().__init__()
        self._recipe, self._options, self._slots = recipe, options, slots
        pools = pools_of(entries, None)
        weights = [entries[pool[0]].options.weight for pool in pools]
        self._weights = np.asarray([1.0 if w is None else w for w in weights])
        self._lanes = [
            _Lane(recipe, entries, pool, number, options, tok, slots, usages)
            for number, pool in enumerate(pools)
        ]

    def __next__(self) -> Any:
        rows: list[_Row] = []
        while len(rows) < self._options.rows:
            # The lane that is furthest behind its share; the first one on a tie.
            given = np.asarray([lane.given for lane in self._lanes])
            turn = int(np.argmin((given + 0.5) / self._weights))
            row = self._lanes[turn].next_row()
            if row is None:
                break
            rows.append(row)
        if not rows:
            raise StopIteration
        return self._build(rows)

    def _build(self, rows: Sequence[_Row]) -> Any:
        """Rows of one batch can come from several windows, so their documents are joined first."""
        examples: list[Any] = []
        sides: list[list[Any]] = [[] for _ in range(max(len(row.kept.sides) for row in rows))]
        sources: list[int] = []
        marks: list[np.ndarray] = []
        groups: list[Group] = []
        for row in rows:
            group: list[Any] = []
            for member in row.group:
                at = member if isinstance(member, int) else member.document
                new = len(examples)
                group.append(new if isinstance(member, int) else member._replace(document=new))
                examples.append(row.kept.examples[at])
                sources.append(int(row.kept.sources[at]))
                for number, side in enumerate(sides):
                    there = number < len(row.kept.sides)
                    side.append(row.kept.sides[number][at] if there else None)
                if row.kept.marks is not None:
                    marks.append(row.kept.marks[at])
            groups.append(group)
        groups += [()] * (self._options.rows - len(rows))
        kept = Kept(examples, sides, np.asarray(sources, np.int32), marks if marks else None)
        return self._recipe.build(kept, groups, self._options, self._options.length, self._slots)

    def get_state(self) -> dict[str, Any]:
        """The position of each lane, and the counts up to it."""
        counts = Counts()
        for lane in self._lanes:
            counts = counts + lane.counts
        return {"lanes": [lane.get_state() for lane in self._lanes], "counts": counts.values()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position."""
        for lane, saved in zip(self._lanes, state["lanes"], strict=True):
            lane.set_state(saved)

    def close(self) -> None:
        """Closes files."""
        super().close()
        for lane in self._lanes:
            lane.close()


class _Lane:
    """The rows of some sources, one after the other, window by window, pass after pass."""

    def __init__(
        self,
        recipe: Recipe,
        entries: Sequence[Entry],
        pool: Sequence[int],
        number: int,
        options: Options,
        tok: PreTrainedTokenizerBase,
        most: int,
        usages: dict[str, Usage],
    ):
        self._recipe, self._entries, self._pool = recipe, entries, pool
        self._number, self._options, self._tok, self._most = number, options, tok, most
        self._usages = usages  # source → what became of its columns
        self.close()
        # The start of the current window: the pass, the source, and its rows read before.
        self._at = (0, 0, 0)
        self._next = (0, 0, 0)
        self._kept_in_pass = 0
        self._shown: set[str] = set()  # sources whose columns were printed
        self._rows: list[_Row] = []
        self._done = 0
        self.given = 0
        self._before = Counts()
        self._window = Counts()

    @property
    def counts(self) -> Counts:
        """The counts of the windows begun so far."""
        return self._before + self._window

    def next_row(self) -> _Row | None:
        """The next row; None at the end of the last pass."""
        while self._done == len(self._rows):
            if not self._next_window():
                return None
        row = self._rows[self._done]
        self._done += 1
        self.given += 1
        return row

    def _next_window(self) -> bool:
        passes = self._options.epochs
        if passes is not None and self._next[0] >= passes:
            return False
        self._before, self._window = self.counts, Counts()
        self._at = self._next
        self._rows, self._done = self._make(), 0
        return True

    def _make(self) -> list[_Row]:
        """Reads the window that begins at `_at`; sets where the next one begins."""
        number, source, first = self._at
        entry = self._entries[self._pool[source]]
        if self._reading is None:
            self._reading = SourceReader(self._recipe, entry, self._options)
            if first:
                self._reading.skip(first)
        limit = entry.options.rows
        size = self._options.window if limit is None else min(self._options.window, limit - first)
        examples = self._reading.take(size, self._window) if size > 0 else None
        if examples is None:
            self.close()
            if source + 1 < len(self._pool):
                self._next = (number, source + 1, 0)
            else:
                if not self._kept_in_pass:
                    raise ValueError(nothing_left(self._recipe, self._options, self.counts))
                self._kept_in_pass = 0
                self._next = (number + 1, 0, 0)
            return []
        self._next = (number, source, self._reading.rows)
        sources = [self._pool[source]] * len(examples)
        kept = prepare(
            self._recipe,
            examples,
            sources,
            self._entries,
            self._options,
            self._tok,
            self._window,
            choosing=False,
        )
        if not kept.examples:
            return []
        self._usages[entry.name] = self._reading.usage
        if entry.name not in self._shown and self._options.host[0] == 0:
            print("\n".join([str(self._reading.usage), *self._recipe.notes()]))
            self._shown.add(entry.name)
        self._kept_in_pass += len(kept.examples)
        which = range(len(kept.examples))
        groups, sizes = grouped(self._recipe, kept, which, self._options, self._most)
        count_rows(self._window, self._recipe, kept, sizes, self._options)
        rows = [_Row(kept, group) for group in groups]
        if self._options.shuffle:
            key = np.random.default_rng([self._options.seed, self._number, *self._at])
            rows = [rows[i] for i in key.permutation(len(rows))]
        return rows

    def get_state(self) -> dict[str, Any]:
        """The window's start, how much of it was used, and the counts before it."""
        return {
            "at": list(self._at),
            "next": list(self._next),
            "done": self._done,
            "given": self.given,
            "kept": self._kept_in_pass,
            "before": self._before.values(),
            "window": self._window.values(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Rebuilds the window and skips to the row."""
        self.close()
        self._before, self._window = Counts(state["before"]), Counts()
        self._at = tuple(state["at"])
        self._next = tuple(state["next"])
        self._rows, self._done = [], state["done"]
        self.given = state["given"]
        if self._at == self._next:  # nothing was read yet
            self._done = 0
            return
        self._rows = self._make()
        self._next = tuple(state["next"])
        self._kept_in_pass = state["kept"]

    def close(self) -> None:
        """Closes the source's file."""
        self._reading: SourceReader | None = None


def _checksum(
    recipe: Recipe, entries: Sequence[Entry], options: Options, tok: PreTrainedTokenizerBase
) -> int:
    """A number that changes with the settings, the tokenizer, the template or a file's size.

    It does not read the files' contents.
    """
    settings = [recipe.name, *settings_of(options), _template(tok, options), len(tok)]
    for entry in entries:
        settings += [entry.name, str(entry.options)]
        if isinstance(entry.what, list):
            settings.append(json.dumps(entry.what, sort_keys=True, default=str))
            continue
        path = pathlib.Path(os.fspath(entry.what))
        settings += [path.stat().st_size if path.is_file() else None]
    return zlib.crc32(json.dumps(settings).encode())


def _template(tok: PreTrainedTokenizerBase, options: Options) -> str | None:
    """The chat template, or None if there is none (plain texts need none)."""
    try:
        return resolve_chat_template(tok, options.chat_template)
    except ValueError:
        return None
