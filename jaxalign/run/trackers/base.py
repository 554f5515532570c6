"""What a tracker offers, and what it is told about the run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """A run as its trackers see it.

    Attributes:
      folder: the run's.
      project: what the tracker groups runs by.
      name: of the run, for people: the last part of its folder.
      config: option → value, flat, such as `{"data.rows": 8}`.
      identity: by which the tracker finds the run that an earlier start began; None: a new one.
      done: steps done when this start begins.
    """

    folder: pathlib.Path
    project: str
    name: str
    config: Mapping[str, Any]
    identity: str | None = None
    done: int = 0


class Tracker(Protocol):
    """A service or file format that shows the metrics of a run.

    Its constructor takes a `TrackedRun`, and begins the tracker's run or continues it. A method
    may raise any `Exception`: the caller reports it and stops using the tracker. All calls come
    from one thread.

    Attributes:
      identity: by which a later start finds this run.
      rewinds: whether, when it continues a run, it drops what it holds of later steps than `done`.
    """

    identity: str
    rewinds: bool

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers of a step, by their names in `metrics.jsonl`."""

    def histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Records counts `[B]` between edges `[B + 1]`."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records sampled answers: `prompt`, `answer` and further columns, the same in each row."""

    def close(self, *, failed: bool) -> None:
        """Sends what is left and ends the tracker's run; `failed`: by an error."""
