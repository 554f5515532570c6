"""Which rows make up batch k: mixing, shuffling and bucketing as arithmetic on indices, with grain.

Nothing here knows what a row holds. Rows are numbered, first those of pool 0, then those of pool 1
and so on. A pool is the unit of mixing: the rows of one weighted source, or of all sources without
weights together. In one pass pool p gives `share` of its rows, the next ones of its own endless,
reshuffled sequence. Over many passes each of its rows is therefore seen equally often.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

_ENDLESS = 2**62  # not sys.maxsize: grain divides lengths as floats, which would round it up


class Pool(NamedTuple):
    """A part of a mixture.

    Attributes:
      rows: the number of rows.
      share: how many rows one pass takes; a number above `rows` repeats some.
    """

    rows: int
    share: int


class Chosen(NamedTuple):
    """The rows chosen for a batch, before it is built.

    Attributes:
      rows: its row numbers; fewer than a full batch only where the data ends.
      width: the width of its rows, in positions.
    """

    rows: list[int]
    width: int


def batches_of(
    pools: Sequence[Pool],
    sizes: Sequence[int],
    *,
    rows: int,
    widths: Sequence[int],
    passes: int | None,
    seed: int,
    shuffle: bool,
) -> grain.MapDataset:
    """All batches of a run, in order.

    Args:
      pools: the pools to mix.
      sizes: the tokens of every row, for choosing its bucket.
      rows: B.
      widths: the buckets' widths, ascending; every size is at most the last one.
      passes: passes over the mixture; None: forever.
      seed: the seed of the order.
      shuffle: whether every pass has a new order.

    Returns:
      A dataset of `Chosen`. With one width, batches continue across the ends of passes, and only
      the very last may be short. With several widths, rows left over in a bucket move to the next
      wider one, so each pass ends with at most one short batch.
    """
    stream = _rows(pools, passes, seed, shuffle)
    if len(widths) == 1:

        def take(which: Sequence[int]) -> Chosen:
            return Chosen([int(i) for i in which], widths[0])

        return stream.batch(rows, batch_fn=take)
    plan = _Buckets(stream, sum(p.share for p in pools), sizes, rows, widths, seed, shuffle)
    return grain.MapDataset.source(plan)


def spread(shares: Sequence[int]) -> np.ndarray:
    """The order in which pools take turns: `[Σ shares]` pool numbers, each pool evenly spaced.

    >>> spread([4, 2]).tolist()
    [0, 1, 0, 0, 1, 0]
    """
    places = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in shares])
    pools = np.repeat(np.arange(len(shares)), shares)
    return pools[np.argsort(places, kind="stable")]


def _rows(pools: Sequence[Pool], passes: int | None, seed: int, shuffle: bool) -> grain.MapDataset:
    """Row numbers over all passes."""
    if len(pools) == 1 and pools[0].rows == pools[0].share:
        data = grain.MapDataset.source(range(pools[0].rows)).seed(seed)
        data = data.shuffle() if shuffle else data
        return data.repeat(_ENDLESS // len(data) if passes is None else passes)
    return grain.MapDataset.source(_Mixture(pools, passes, seed, shuffle))


class _Mixture:
    """Row numbers of several pools, taking turns."""

    def __init__(self, pools: Sequence[Pool], passes: int | None, seed: int, shuffle: bool):
        shares = [pool.share for pool in pools]
        self._turns = spread(shares)
        # For each turn: how many earlier turns its pool has had in this pass.
        self._before = np.empty(len(self._turns), np.int64)
        for number in range(len(pools)):
            mine = np.flatnonzero(self._turns == number)
            self._before[mine] = np.arange(len(mine))
        self._shares = shares
        self._first = np.cumsum([0, *(pool.rows for pool in pools)])
        self._pools = []
        for number, pool in enumerate(pools):
            own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            data = grain.MapDataset.source(range(pool.rows)).seed(own)
            self._pools.append((data.shuffle() if shuffle else data).repeat(None))
        self._length = _times(len(self._turns), passes)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> int:
        number, turn = divmod(int(index), len(self._turns))
        pool = int(self._turns[turn])
        at = number * self._shares[pool] + int(self._before[turn])
        return int(self._first[pool]) + int(self._pools[pool][at])


class _Buckets:
    """Batches of rows of similar size, planned one pass at a time."""

    def __init__(
        self,
        stream: grain.MapDataset,
        size: int,
        sizes: Sequence[int],
        rows: int,
        widths: Sequence[int],
        seed: int,
        shuffle: bool,
    ):
        self._stream, self._size, self._rows = stream, size, rows
        self._bucket = np.searchsorted(np.asarray(widths), np.asarray(sizes))
        self._widths, self._seed, self._shuffle = widths, seed, shuffle
        self._each = -(-size // rows)
        self._passes = min(len(stream) // size, sys.maxsize // self._each)
        self._plan = functools.lru_cache(maxsize=2)(self._make_plan)

    def __len__(self) -> int:
        return self._passes * self._each

    def __getitem__(self, index: Any) -> Chosen:
        number, at = divmod(int(index), self._each)
        return self._plan(number)[at]

    def _make_plan(self, number: int) -> list[Chosen]:
        start = number * self._size
        which = np.asarray([self._stream[i] for i in range(start, start + self._size)])
        buckets = self._bucket[which]
        plan: list[Chosen] = []
        waiting: list[int] = []
        for bucket, width in enumerate(self._widths):
            waiting += which[buckets == bucket].tolist()
            full = len(waiting) // self._rows * self._rows
            if bucket == len(self._widths) - 1:
                full = len(waiting)
            for at in range(0, full, self._rows):
                plan.append(Chosen(waiting[at : min(at + self._rows, full)], width))
            waiting = waiting[full:]
        if self._shuffle:
            # The one short batch, if any, stays the last of its pass.
            short = [plan.pop()] if len(plan[-1].rows) < self._rows else []
            key = np.random.default_rng([self._seed, number])
            plan = [plan[i] for i in key.permutation(len(plan))] + short
        return plan


def _times(size: int, passes: int | None) -> int:
    return _ENDLESS // size * size if passes is None else size * passes
