"""Handles rows that cannot be used: stops at the first, or drops, counts and prints them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from jaxalign.data.columns import Columns, Reading, Recorded
from jaxalign.data.examples import RowError
from jaxalign.data.meaning import Untrained
from jaxalign.data.sources import Row, Sources, iter_rows

OnError = Literal["stop", "drop"]
ON_ERROR: tuple[OnError, ...] = ("stop", "drop")

Example = TypeVar("Example")


class Faults:
    """Counts rows: `read` is always `kept` plus all of `dropped`.

    Pass it as `on_fault` wherever rows are read or encoded. With `on_error="stop"` it raises the
    first error; with "drop" it counts errors by reason.

    Attributes:
      on_error: "stop" or "drop".
      read: rows of the sources, including bad rows.
      dropped: reason → rows.
      first: reason → the first error of this reason, with its `file:line` and remedy.
    """

    def __init__(self, on_error: OnError = "stop"):
        if on_error not in ON_ERROR:
            raise ValueError(f"on_error: got {on_error!r}, wanted one of {', '.join(ON_ERROR)}")
        self.on_error = on_error
        self.read = 0
        self.dropped: dict[str, int] = {}
        self.first: dict[str, RowError] = {}

    def __call__(self, fault: RowError) -> None:
        """Raises the fault, or counts its row as dropped.

        Rows that are flagged as not to be trained are always dropped.
        """
        if self.on_error == "stop" and not isinstance(fault, Untrained):
            raise fault
        self.dropped[fault.reason] = self.dropped.get(fault.reason, 0) + 1
        self.first.setdefault(fault.reason, fault)

    @property
    def kept(self) -> int:
        """The number of rows that were read and not dropped."""
        return self.read - sum(self.dropped.values())

    def describe(self) -> str:
        """One line per reason, with the first row dropped for it; empty if no row was dropped."""
        return "\n".join(
            f"  dropped {count}: {why} (first: {self.first[why]})"
            for why, count in self.dropped.items()
        )


def read_examples(
    sources: Sources,
    reader: Callable[..., Example],
    *,
    columns: Columns = None,
    form: str | None = None,
    faults: Faults | None = None,
    on_read: Callable[[Reading], None] | None = None,
) -> Iterator[Example]:
    """Examples of all rows of all sources, one at a time.

    Args:
      sources: see `jaxalign.data.sources.read_rows`.
      reader: one of `jaxalign.data.rows`, such as `to_conversation`.
      columns: our column → theirs.
      form: the form of the rows, if several would fit.
      faults: what to do with a bad row, and where rows are counted; None stops at the first.
      on_read: called with the `Reading` of each row that gave an example.

    Raises:
      ValueError: as `read_rows`; a bad row, unless `faults` drops it.
    """
    faults = Faults() if faults is None else faults

    def count(fault: RowError) -> None:
        faults.read += 1
        faults(fault)

    row: Row
    for row in iter_rows(sources, count):
        options: dict[str, Any] = {"columns": columns, "form": form}
        faults.read += 1
        data = Recorded(row.data, row.data, Reading())
        try:
            example = reader(row._replace(data=data), **options)
        except RowError as fault:
            faults(fault)
        else:
            if on_read is not None:
                on_read(data.reading)
            yield example
