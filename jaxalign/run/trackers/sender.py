"""Runs a tracker in its own thread, so that a slow or dead server never delays training."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxalign.run.trackers.base import Tracker

CAPACITY = 10_000
"""The most entries that may wait for a tracker: one per step, plus histograms and samples."""

PATIENCE = 60.0
"""Seconds that a run waits at its end for unsent data."""


class Failure(NamedTuple):
    """Why a tracker is no longer used.

    Attributes:
      step: the first step that it may lack.
      cause: the reason, for display.
    """

    step: int
    cause: str


class _End(NamedTuple):
    failed: bool


class Sender:
    """Passes entries to a tracker in order; after the first failure it drops them.

    Args:
      name: its name in `run.trackers`.
      tracker: its methods are called only in this sender's thread.
      held: metric → the last step for which the tracker has it; such entries are skipped.

    Attributes:
      failure: the failure, or None; set once.
    """

    def __init__(self, name: str, tracker: Tracker, held: Mapping[str, int]):
        self.name, self.identity = name, tracker.identity
        self.failure: Failure | None = None
        self._tracker, self._held = tracker, dict(held)
        self._last = max(held.values(), default=-1)
        self._queue: queue.Queue[tuple[int, Callable[[], None]] | _End] = queue.Queue(CAPACITY)
        self._step = 0
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Queues those numbers of a step that the tracker lacks."""
        lacking = {k: v for k, v in values.items() if step > self._held.get(k, -1)}
        if lacking:
            self._put(step, lambda: self._tracker.scalars(step, lacking))

    def histogram(self, step: int, name: str, edges: list[float], counts: list[float]) -> None:
        """Queues a histogram."""
        if step > self._last:
            self._put(step, lambda: self._tracker.histogram(step, name, edges, counts))

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Queues sampled answers."""
        if step > self._last:
            self._put(step, lambda: self._tracker.samples(step, rows))

    def close(self, *, failed: bool, patience: float = PATIENCE) -> None:
        """Sends waiting entries and ends the tracker's run; gives up after `patience` seconds."""
        try:
            self._queue.put(_End(failed), timeout=patience)
            self._thread.join(patience)
        except queue.Full:
            pass
        if self._thread.is_alive() and self.failure is None:
            waiting = self._queue.qsize()
            self.failure = Failure(
                self._step, f"{waiting} entries were not sent after {patience:g} s"
            )

    def _put(self, step: int, send: Callable[[], None]) -> None:
        if self.failure is not None:
            return
        try:
            self._queue.put_nowait((step, send))
        except queue.Full:
            self.failure = Failure(self._step, f"it is {CAPACITY} entries behind")

    def _work(self) -> None:
        while True:
            entry = self._queue.get()
            try:
                if isinstance(entry, _End):
                    self._tracker.close(failed=entry.failed)
                    return
                if self.failure is None:
                    self._step, send = entry
                    send()
            except Exception as error:
                if self.failure is None:
                    self.failure = Failure(self._step, f"{type(error).__name__}: {error}")
                if isinstance(entry, _End):
                    return
