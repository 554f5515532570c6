"""Counts of what happens to rows, by source, in numbers that can be added up and saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

COUNTED = (
    *("read", "kept", "cut", "repeated", "added", "tokens", "trained", "saved"),
    *("rows", "room", "share"),
)


class Counts:
    """Numbers by source, kind of count, and (for dropped rows) the reason."""

    def __init__(self, values: Mapping[str, int] | Iterable[tuple[str, int]] = ()):
        self._values: Counter[str] = Counter(dict(values))

    def add(self, source: str, what: str, number: int = 1, reason: str = "") -> None:
        """Counts `number` more of something."""
        self._values["\t".join((source, what, reason))] += number

    def drop(self, source: str, reason: str, number: int = 1) -> None:
        """Counts dropped rows."""
        self.add(source, "dropped", number, reason)

    def __add__(self, other: Counts) -> Counts:
        return Counts(self._values + other._values)

    def values(self) -> dict[str, int]:
        """The counts as plain data; `Counts(values)` restores them."""
        return dict(self._values)

    def stats(self, sources: Iterable[str]) -> dict[str, Any]:
        """Sums over sources, and under "sources" the same for each."""
        return self._sums(None) | {"sources": {name: self._sums(name) for name in sources}}

    def _sums(self, source: str | None) -> dict[str, Any]:
        sums: dict[str, Any] = dict.fromkeys(COUNTED, 0) | {"dropped": {}}
        for key, number in self._values.items():
            name, what, reason = key.split("\t")
            if source in (None, name):
                if what == "dropped":
                    sums["dropped"][reason] = sums["dropped"].get(reason, 0) + number
                else:
                    sums[what] += number
        room, rows = sums.pop("room"), sums.pop("rows")
        if source is not None:
            return sums
        del sums["share"]
        return sums | {"rows": rows, "fill": sums["tokens"] / room if room else 0.0}
