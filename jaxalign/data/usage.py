"""How a source's columns were used, in one line that is printed once."""

from __future__ import annotations

from collections import Counter

from jaxalign.data.columns import Reading
from jaxalign.data.names import meaning_of

_MOST = 30  # the most columns named in a line


class Usage:
    """Collects what was read from a source's rows.

    Attributes:
      source: its name.
    """

    def __init__(self, source: str):
        self.source = source
        self._forms: Counter[str] = Counter()
        self._columns: dict[tuple[str, str], None] = {}
        self._unused: Counter[str] = Counter()
        self._nulls = 0

    def __call__(self, reading: Reading) -> None:
        """Adds the reading of one row."""
        self._forms[reading.form] += 1
        for ours, theirs in reading.columns.items():
            self._columns[theirs, meaning_of(ours) or ours] = None
        self._unused.update(reading.unused)
        self._nulls += reading.nulls

    def __str__(self) -> str:
        """`talks: 12 rows as completion; question → prompt, reply → completion; not used: id`."""
        if not self._forms:
            return f"{self.source}: no row was read"
        forms = " and ".join(
            f"{count} {'row' if count == 1 else 'rows'} as {form}"
            for form, count in self._forms.items()
        )
        parts = [forms, _listed([f"{name} → {meaning}" for name, meaning in self._columns])]
        read = {name for name, _ in self._columns}
        unused = [
            name if name not in read else f"{name} (in {count} rows)"
            for name, count in self._unused.items()
        ]
        if unused:
            parts.append(f"not used: {_listed(unused)}")
        if self._nulls:
            parts.append(f"{self._nulls} null-filled keys left out")
        return f"{self.source}: {'; '.join(parts)}"


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(str(name)[:60] for name in names[:_MOST]) + more
