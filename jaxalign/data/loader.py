"""Batches in an order whose position can be saved and resumed.

`grain` iterates: it prefetches batches in a thread, and its position can be saved. The rows of
batch k depend only on k, so a position counts global batches and does not depend on the number of
hosts.
"""

from __future__ import annotations

import json
import math
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import grain
import numpy as np

from jaxalign.data.counts import Counts
from jaxalign.data.extent import Extent, Limits, extent_of, extent_of_batch
from jaxalign.data.mixture import Entry, pools_of, shares_of
from jaxalign.data.options import Options, settings_of
from jaxalign.data.order import Chosen, batches_of
from jaxalign.data.packing import Piece
from jaxalign.data.prepare import Group, Kept, Recipe, SourceReader, grouped, prepare
from jaxalign.types import PromptBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = TypeVar("Batch")


class Batches(Generic[Batch]):
    """An iterable of batches with a position that can be saved.

    `iter()` starts at the beginning; the first `iter()` after `set_state` starts at that position.
    Every pass gives the same batches.

    Attributes:
      examples: the kept rows as examples (such as `Conversation`); empty when streaming.
      sources: names of the sources, in the order of `source_ids`.
      widths: the widths that batches may have.
      per_epoch: batches per pass over the data; a fraction if a batch continues into the next pass;
        None (unknown) when streaming.
    """

    def __init__(
        self,
        name: str,
        options: Options,
        sources: Sequence[str],
        data: grain.IterDataset,
        *,
        length: int | None,
        checksum: int,
        counts: Counts | None,
        examples: list[Any],
        usage: Callable[[], Sequence[str]] = tuple,
        per_epoch: float | None = None,
        rows_of: Callable[[int], list[int]] | None = None,
        extent: Extent | None = None,
    ):
        self.examples = examples
        self.sources = tuple(sources)
        self.widths = options.widths
        self._usage = usage
        self.per_epoch = per_epoch
        self._name, self._rows_of = name, rows_of
        self._extent = extent
        self._limits: Limits | None = None
        self._options = options
        self._data = data
        self._length = length
        self._checksum = checksum
        self._counts = counts
        self._announced: Any = None
        self._shown = False
        self._start: dict[str, Any] | None = None
        self._iterator: Any = None

    @property
    def usage(self) -> tuple[str, ...]:
        """How the columns of each source were used, one line per source.

        It is printed at the first `iter()`, or when streaming after a source's first window. When
        streaming, it covers the windows read so far.
        """
        return tuple(self._usage())

    @property
    def checksum(self) -> int:
        """A number that changes with the data and with every setting that shapes batches."""
        return self._checksum

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of rows and tokens.

        `read` rows; `kept` rows; `dropped` rows by reason; `cut` rows; `repeated` rows, used again
        to reach a number of rows; `added`, the extra examples of rows that gave several; `tokens`
        and `trained` tokens that were kept; `saved` tokens, from prompts that pairs share; `rows`
        of batches that the tokens fill (in a pass without mixing); `fill`, the fraction of those
        rows' positions that hold tokens, in (0, 1]; and under `sources` the same by source, with
        its `share`, the rows per pass over a mixture. read + added + repeated = kept + dropped.
        When streaming, the counts cover the windows begun so far, over all passes.
        """
        counts = self._counts
        if counts is None:
            counts = Counts(self.get_state()["position"]["counts"])
        return counts.stats(self.sources)

    def rows_of(self, batch: int) -> list[int]:
        """Which of `examples` are in a batch, counted from 0 over all passes; [] when streaming."""
        return [] if self._rows_of is None else self._rows_of(batch)

    def check_model(self, limits: Limits) -> None:
        """Rejects documents that a model cannot read: now, or batch by batch when streaming.

        Args:
          limits: the model's embedding rows and positions.

        Raises:
          ValueError: a token without an embedding row, or a document beyond the learned positions.
        """
        self._limits = limits
        if self._extent is not None:
            limits.check(self._extent, self._name)
            note = limits.note(self._extent, self._name)
            if note:
                print(note, flush=True)

    def __len__(self) -> int:
        """Batches in all epochs together."""
        if self._options.streaming:
            raise TypeError(f"{self._name} with streaming=True has no len(): it reads as it goes")
        if self._length is None:
            raise TypeError(f"{self._name} with epochs=None goes on forever: it has no len()")
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        if self._options.streaming:
            self.close()
        else:
            self._announce()
        iterator: Any = iter(self._data)
        if self._options.streaming:
            iterator = _Running(iterator, self._announce, self._check)
        self._iterator = iterator
        if self._start is not None:
            self._iterator.set_state(self._start)
            self._start = None
        return self._iterator

    def _check(self, batch: Any) -> None:
        if self._limits is not None:
            self._limits.check(extent_of_batch(batch), self._name)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch that was returned, as JSON-able data."""
        if self._start is not None:
            position = self._start
        else:
            source = self._iterator if self._iterator is not None else iter(self._data)
            position = source.get_state()
        return {"position": json.loads(json.dumps(position)), "checksum": self._checksum}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Makes the next `iter()` start at a saved position.

        Raises:
          ValueError: the state was saved with other data or settings (tokenizer, template, rows,
            length, packing, mixture, seed, shuffle), so its position would mean other batches.
        """
        if set(state) != {"position", "checksum"}:
            raise ValueError(
                f"state: got the keys {sorted(state)}, wanted checksum and position; "
                f"pass what {self._name}(...).get_state() gave"
            )
        if state["checksum"] != self._checksum:
            raise ValueError(
                f"state: it belongs to other data or settings (checksum {state['checksum']}, here "
                f"{self._checksum}); resume with the same files, tokenizer, rows, length, packing, "
                "seed and shuffle, or start a new run"
            )
        self._start = dict(state["position"])

    def close(self) -> None:
        """Stops the prefetching thread and closes files; `iter()` starts again."""
        if isinstance(self._iterator, _Running):
            self._announce()
        if self._iterator is not None:
            self._iterator.close()

    def _announce(self) -> None:
        """Prints once what was truncated and dropped, and how columns were used."""
        stats = self.stats
        lost = (stats["cut"], stats["dropped"])
        if any(lost) and self._announced != lost:
            self.describe()
        elif self._is_to_be_shown():
            print("\n".join(self.usage))
        self._shown = True

    def _is_to_be_shown(self) -> bool:
        streaming, main = self._options.streaming, self._options.host[0] == 0
        return bool(self.usage) and not self._shown and main and not streaming

    @property
    def report(self) -> str:
        """A text: rows read, truncated and dropped, the use of columns, and how full rows are."""
        if self._options.streaming and self._iterator is None:
            return f"{self._name}: a stream; nothing was read yet"
        return "\n".join([self._summary(), *(f"  {line}" for line in self.usage)])

    def describe(self) -> str:
        """Prints, and returns, the `report`."""
        text = self.report
        self._announced = (self.stats["cut"], self.stats["dropped"])
        print(text)
        return text

    def _summary(self) -> str:
        s, length = self.stats, self._options.length
        lines = [
            f"{self._name}: {s['read']} rows read, {s['kept']} kept, {s['cut']} cut to {length} "
            f"tokens, {sum(s['dropped'].values())} dropped; {s['tokens']:,} tokens"
            + (f" ({s['trained']:,} trained)" if s["trained"] else "")
            + (f", {s['saved']:,} saved by sharing prompts" if s["saved"] else "")
            + f" in {s['rows']} rows of {'up to ' if len(self.widths) > 1 else ''}{length}, "
            f"{s['fill']:.1%} filled"
        ]
        lines += [f"  dropped {count}: {why}" for why, count in s["dropped"].items()]
        if len(self.sources) > 1:
            for name, own in s["sources"].items():
                lines.append(
                    f"  {name}: {own['read']} read, {own['kept']} kept, "
                    f"{sum(own['dropped'].values())} dropped, {own['tokens']:,} tokens"
                    + (f", {own['share']} rows a pass" if own["share"] else "")
                )
        return "\n".join(lines)


class _Running(Iterator[Any]):
    """A grain iterator with a thread; prints a report at its end, and stops before Python exits."""

    def __init__(self, iterator: Any, say: Callable[[], None], check: Callable[[Any], None]):
        self._say, self._check = say, check
        self._last: Any = None
        self._box = [iterator]
        # grain's iterators close themselves, but this fails while Python tears down modules at
        # exit.
        weakref.finalize(self, _end, self._box)

    def __next__(self) -> Any:
        if not self._box:
            raise ValueError("these batches were closed; call iter() again")
        try:
            batch = next(self._box[0])
        except StopIteration:
            self._say()
            raise
        self._check(batch)
        return batch

    def get_state(self) -> Any:
        return self._box[0].get_state() if self._box else self._last

    def set_state(self, state: Any) -> None:
        self._box[0].set_state(state)

    def close(self) -> None:
        self._last = self.get_state()
        _end(self._box)


def _end(box: list[Any]) -> None:
    while box:
        box.pop().close()


def in_memory(
    recipe: Recipe, entries: Sequence[Entry], options: Options, tok: PreTrainedTokenizerBase
) -> Batches[Any]:
    """Reads and prepares everything, then batches it."""
    counts = Counts()
    examples: list[Any] = []
    sources: list[int] = []
    usage: list[str] = []
    for number, entry in enumerate(entries):
        reader = SourceReader(recipe, entry, options)
        read = reader.take(None, counts)
        examples += read if read is not None else []
        usage.append(str(reader.usage))
        sources += [number] * (len(examples) - len(sources))
    kept = prepare(recipe, examples, sources, entries, options, tok, counts)
    usage += recipe.notes()
    pools, groups, sizes, rows = pools_of(entries, options.temperature), [], [], []
    for pool in pools:
        mine = np.flatnonzero(np.isin(kept.sources, pool)).tolist()
        if not mine:
            names = ", ".join(repr(entries[number].name) for number in pool)
            raise ValueError(
                f"{recipe.name}: no row of {names} is left to train on; see what was dropped: "
                f"{counts.stats(())['dropped']}; correct it, or leave the source out"
            )
        more, their_sizes = grouped(recipe, kept, mine, options)
        groups += more
        sizes += their_sizes
        rows.append(len(more))
    shares = shares_of(entries, pools, rows, options.temperature)
    count_rows(counts, recipe, kept, sizes, options)
    if any(pool.rows != pool.share for pool in shares):
        for pool, share in zip(pools, shares, strict=True):
            if len(pool) == 1:
                counts.add(entries[pool[0]].name, "share", share.share)
    order = batches_of(
        shares,
        sizes,
        rows=options.rows,
        widths=options.widths,
        passes=options.epochs,
        seed=options.seed,
        shuffle=options.shuffle,
    )
    slots = max(len(group) for group in groups)

    def assemble(chosen: Chosen) -> Any:
        members = [groups[i] for i in chosen.rows]
        members += [()] * (options.rows - len(members))
        return recipe.build(kept, members, options, chosen.width, slots)

    def rows_of(batch: int) -> list[int]:
        chosen: Chosen = order[batch]  # pyrefly: ignore[bad-assignment]
        members = [member for i in chosen.rows for member in groups[i]]
        return [member.document if isinstance(member, Piece) else member for member in members]

    # One thread is enough: assembling rows takes microseconds; it only must not delay a step.
    ahead = grain.ReadOptions(
        num_threads=min(options.prefetch, 1), prefetch_buffer_size=options.prefetch
    )
    return Batches(
        recipe.name,
        options,
        [entry.name for entry in entries],
        order.map(assemble).to_iter_dataset(ahead),
        length=None if options.epochs is None else len(order),
        checksum=_checksum(recipe, options, kept, groups, [tuple(s) for s in shares]),
        counts=counts,
        examples=kept.examples,
        usage=lambda: usage,
        per_epoch=_per_epoch([share.share for share in shares], options),
        rows_of=rows_of,
        extent=extent_of(d.ids for side in kept.sides for d in side if d is not None),
    )


def _per_epoch(shares: Sequence[int], options: Options) -> float:
    """Batches of one pass, see `order.batches_of`."""
    batches = sum(shares) / options.rows
    return batches if len(options.widths) == 1 else math.ceil(batches)


def count_samples(batch: Any) -> int:
    """How many samples a batch on this host holds: documents, pairs, rankings or prompts.

    Rows that fill up the last batch hold none. If `packing="wrapped"` cuts a document, each piece
    counts.
    """
    for part in batch if isinstance(batch, tuple) else ():
        if isinstance(part, TokenBatch | PromptBatch):
            return count_samples(part)
    if isinstance(batch, PromptBatch):
        return int(np.count_nonzero(np.any(batch.mask, axis=1)))
    if not isinstance(batch, TokenBatch):
        return 0
    segments = np.asarray(batch.segment_ids)
    if segments.ndim == 3:  # a ranking's answers
        return int(np.count_nonzero(np.any(segments, axis=(1, 2))))
    return int(segments.max(axis=1).sum())


def filled(batch: Any) -> tuple[int, int]:
    """How many of a batch's positions hold tokens, and the total number of positions."""
    full, room = 0, 0
    todo = [batch]
    while todo:
        part = todo.pop()
        if isinstance(part, TokenBatch):
            full, room = full + np.count_nonzero(part.segment_ids), room + part.inputs.size
        elif isinstance(part, PromptBatch):
            full, room = full + np.count_nonzero(part.mask), room + part.mask.size
        elif isinstance(part, tuple):
            todo += part
    return int(full), int(room)


def count_rows(
    counts: Counts, recipe: Recipe, kept: Kept, sizes: Sequence[int], options: Options
) -> None:
    """Counts rows and their positions; not by source, because documents of several share rows."""
    widths = np.asarray(options.widths)
    room = int(widths[np.searchsorted(widths, np.asarray(sizes))].sum())
    counts.add("", "rows", len(sizes))
    counts.add("", "room", room * (1 if recipe.shared else len(kept.sides)))


def _checksum(
    recipe: Recipe, options: Options, kept: Kept, groups: Sequence[Group], shares: Sequence[Any]
) -> int:
    """A number that changes when a saved position would mean other batches."""
    settings = [recipe.name, *settings_of(options), list(shares), len(groups)]
    checksum = zlib.crc32(json.dumps(settings).encode())
    for side in kept.sides:
        for document in side:
            if document is not None:
                checksum = zlib.crc32(document.ids.tobytes(), checksum)
                checksum = zlib.crc32(document.trained.tobytes(), checksum)
    return checksum
