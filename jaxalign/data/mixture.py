"""Several sources in one run: their names, and how many rows each contributes."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign.data.order import Pool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One source of a mixture.

    `weight`, `rows` and `epochs` set how much of the source a pass over the mixture takes. Without
    them it takes all rows once.

    Attributes:
      path: file, folder, glob or hub id.
      name: its name in counts and metrics; None: taken from the path.
      split: the split of a hub data set, such as "train[:1000]".
      form: the form of its rows, if their columns are ambiguous; None: recognised from the columns.
      columns: the form's column name → the name in the file.
      weight: its share of the mixture's rows, relative to the other sources' weights, > 0. Either
        all sources have a weight or none. A pass has as many rows as all sources together; a source
        with fewer rows than its share is repeated. The rows are packed rows, so that shares are
        shares of tokens rather than of documents.
      rows: how many of its rows to use, sampled once with the seed; a number above the source's
        size repeats some. When streaming, the first rows are used.
      epochs: how often a pass over the mixture goes over the source, > 0: 2.0 uses each row twice,
        0.5 uses each row in every other pass. Not with weights.
    """

    path: str
    name: str | None = None
    split: str | None = None
    form: str | None = None
    columns: dict[str, str] | None = None
    weight: float | None = None
    rows: int | None = None
    epochs: float | None = None

    def __post_init__(self):
        if not self.path:
            raise ValueError("path: got '', wanted a file, folder, glob or hub id")
        for name in ("weight", "rows", "epochs"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: got {value!r} for {self.path!r}, wanted more than 0")

    @property
    def where(self) -> str:
        """The path with the split, as `read_rows` takes it."""
        return self.path if self.split is None else f"{self.path}:{self.split}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A source to read: `what` is a path, or rows given as dicts."""

    what: Any
    name: str
    options: Source


def entries_of(sources: Any) -> list[Entry]:
    """Turns one source or several into entries with distinct names.

    All rows given as dicts form one source, wherever they are in the list.
    """
    if isinstance(sources, str | os.PathLike | Mapping | Source):
        sources = [sources]
    items = list(sources) if isinstance(sources, Iterable) else [sources]
    found: list[tuple[Any, Source, str | None]] = []
    rows: list[Any] = []
    for item in items:
        if isinstance(item, Source):
            found.append((item.where, item, item.name))
        elif isinstance(item, Mapping):
            if not rows:
                found.append((rows, Source(path="rows"), None))
            rows.append(item)
        elif isinstance(item, str | os.PathLike):
            found.append((item, Source(path=os.fspath(item)), None))
        else:
            found.append((item, Source(path=repr(item)), None))  # rejected when it is read
    short = [_short_name(what) for what, _, _ in found]
    entries: list[Entry] = []
    for (what, options, name), brief in zip(found, short, strict=True):
        if name is None:
            plain = brief if short.count(brief) == 1 else str(what)
            there = [entry.name for entry in entries]
            times = next(n for n in itertools.count(1) if _numbered(plain, n) not in there)
            name = _numbered(plain, times)
        elif name in [entry.name for entry in entries]:
            raise ValueError(
                f"name: two sources are called {name!r}, wanted different names; rename one"
            )
        entries.append(Entry(what, name, options))
    _check_weights(entries)
    return entries


def _numbered(name: str, times: int) -> str:
    """The name of a source that occurs more than once."""
    return name if times == 1 else f"{name} ({times})"


def _short_name(what: Any) -> str:
    if isinstance(what, list):
        return "rows"
    name = os.fspath(what) if isinstance(what, str | os.PathLike) else repr(what)
    path = pathlib.Path(name)
    return path.name.split(".")[0] if os.path.exists(path) else name


def _check_weights(entries: Sequence[Entry]) -> None:
    lacking = [entry.name for entry in entries if entry.options.weight is None]
    if len(lacking) == len(entries):
        return
    if lacking:
        raise ValueError(
            f"weight: {lacking[0]!r} has none while other sources have one; give all sources a "
            "weight, or none"
        )
    for entry in entries:
        if entry.options.epochs is not None:
            raise ValueError(
                f"epochs: got {entry.options.epochs} for {entry.name!r} beside weights, which "
                "already say how much of it is used; leave one of them out"
            )


def pools_of(entries: Sequence[Entry], temperature: float | None) -> list[list[int]]:
    """Which sources are shuffled and packed together: those that give each row once.

    A source with a weight or epochs has its own pool, and with a temperature every source has.

    Returns:
      The sources of each pool, as indices into `entries`.
    """
    together: list[int] = []
    pools: list[list[int]] = []
    for number, entry in enumerate(entries):
        options = entry.options
        alone = options.weight is not None or options.epochs is not None or temperature is not None
        if alone:
            pools.append([number])
        else:
            if not together:
                pools.append(together)
            together.append(number)
    return pools


def shares_of(
    entries: Sequence[Entry],
    pools: Sequence[Sequence[int]],
    rows: Sequence[int],
    temperature: float | None,
) -> list[Pool]:
    """How many rows each pool contributes to a pass.

    Args:
      entries: the sources.
      pools: from `pools_of`.
      rows: the rows of each pool, at least 1.
      temperature: see `Options`.
    """
    weighted = temperature is not None or entries[0].options.weight is not None
    if not weighted:
        return [
            Pool(count, max(1, round(count * _epochs(entries, pool))))
            for pool, count in zip(pools, rows, strict=True)
        ]
    weights = []
    for pool, count in zip(pools, rows, strict=True):
        weight = entries[pool[0]].options.weight
        weights.append(float(count if weight is None else weight))
    shares = apportion(flatten(weights, 1.0 if temperature is None else temperature), sum(rows))
    return [Pool(count, share) for count, share in zip(rows, shares, strict=True)]


def flatten(weights: Sequence[float], temperature: float) -> list[float]:
    """Shares that add up to 1: w_i^(1/τ) / Σ_j w_j^(1/τ)."""
    logs = np.log(np.asarray(weights, np.float64)) / temperature
    powers = np.exp(logs - logs.max())
    return (powers / powers.sum()).tolist()


def apportion(shares: Sequence[float], total: int) -> list[int]:
    """Integers in proportion to shares, at least 1 each, by largest remainders."""
    exact = np.asarray(shares, np.float64) * total
    counts = np.floor(exact).astype(int)
    for number in np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]:
        counts[number] += 1
    return [max(1, int(count)) for count in counts]


def choose(count: int, wanted: int, key: Sequence[int]) -> list[int]:
    """`wanted` of `count` rows, sampled with a key, in order; more than `count` repeats some."""
    whole, rest = divmod(wanted, count)
    drawn = np.random.default_rng(list(key)).permutation(count)[:rest]
    return sorted([*list(range(count)) * whole, *drawn.tolist()])


def _epochs(entries: Sequence[Entry], pool: Sequence[int]) -> float:
    given = entries[pool[0]].options.epochs
    return 1.0 if given is None else given
