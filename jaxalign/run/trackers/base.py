"""The interface of a tracker, and what it knows about the run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol


class TrackedRun(NamedTuple):
    """The run's data for trackers.

    Attributes:
      folder: the run's folder.
      project: what the tracker groups runs by.
      name: of the run, for people: the last part of its folder.
      config: option → value, flat, such as `{"data.rows": 8}`.
      identity: the tracker's id of the run from an earlier start; None: a new run.
      done: steps done before this start.
    """

    folder: pathlib.Path
    project: str
    name: str
    config: Mapping[str, Any]
    identity: str | None = None
    done: int = 0


class Tracker(Protocol):
    """A service or file format that shows the metrics of a run.

    Its constructor takes a `TrackedRun`, and starts or continues the tracker's run. A method may
    raise any `Exception`; the caller then reports it and stops using the tracker. All calls come
    from one thread.

    Attributes:
      identity: the id with which a later start finds this run.
      rewinds: whether, on continuing a run, it drops its data of steps after `done`.
    """

    identity: str
    rewinds: bool

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records a step's numbers, under their names in `metrics.jsonl`."""

    def histogram(
        self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]
    ) -> None:
        """Records counts `[B]` between edges `[B + 1]`."""

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records sampled answers: `prompt`, `answer` and further columns, the same in each row."""

    def close(self, *, failed: bool) -> None:
        """Sends the remaining data and ends the tracker's run; `failed`: it ended with an error."""
