"""Follows a JSONL file in the run's folder: returns a step's rows once the step is reported."""

from __future__ import annotations

import pathlib
from typing import Any

from jaxalign.run.metrics import parse_row


class Tail:
    """Reads rows, each with a `step`, as they are appended to a file.

    The file is first read at the first request. By then a resumed run has dropped the rows of the
    steps that it repeats.

    Args:
      path: the file, which need not exist.
      after: ignore rows up to this step.
    """

    def __init__(self, path: pathlib.Path, after: int):
        self._path, self._after = path, after
        self._offset = 0
        self._waiting: list[dict[str, Any]] = []

    def until(self, step: int) -> list[dict[str, Any]]:
        """The rows up to a step that were not yet returned; later rows wait."""
        self._waiting += [row for row in self._read() if row["step"] > self._after]
        ready = [row for row in self._waiting if row["step"] <= step]
        self._waiting = [row for row in self._waiting if row["step"] > step]
        return ready

    def _read(self) -> list[dict[str, Any]]:
        """Rows of the complete lines that were appended since the last call."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, end, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(end)
        rows = map(parse_row, whole.split(b"\n"))
        return [row for row in rows if row is not None]
