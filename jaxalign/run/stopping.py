"""Signals and time limits that stop a run between two steps, or request a checkpoint.

A run in one process handles the signals itself. With several processes JAX handles SIGTERM (see
`parallel.distributed.preempted`), and one host's request reaches all hosts with the next step's
sums.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NamedTuple

import jax

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
_NOTED = (
    b"\njaxalign: %s: the run saves a checkpoint after this step and ends; once more ends it now\n"
)


class StopRequest:
    """The signal that asked the run to stop, if any.

    Attributes:
      signal: its name ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"), or None.
    """

    signal: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Records the first stop signal instead of ending the process; a second one acts as usual.

    These are SIGTERM (schedulers), Ctrl-C, SIGUSR1 (batch systems, before a time limit) and SIGHUP
    (the terminal is closed; not under `nohup`). With several processes SIGTERM is left to JAX.
    Outside the main thread, where Python allows no handlers, it does nothing.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {
        number: signal.getsignal(number)
        for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
        if number != signal.SIGTERM or jax.process_count() == 1
    }

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        restore()
        # Do not print: the signal may have interrupted a print.
        os.write(2, _NOTED % request.signal.encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()


class Wishes(NamedTuple):
    """Requests after a step.

    Attributes:
      save: save a checkpoint.
      stop: save a checkpoint and stop.
    """

    save: bool
    stop: bool


class Clock:
    """The times at which a run saves, and by which it must have ended.

    Args:
      save_minutes: minutes between two checkpoints; None: off.
      time_limit: minutes for the whole run; None: no limit.
      began: when the command began, on the same clock.
      now: a monotonic clock in seconds.
    """

    def __init__(
        self,
        save_minutes: float | None,
        time_limit: float | None,
        began: float | None = None,
        now: Callable[[], float] = time.monotonic,
    ):
        self._now = now
        self._saved = self._step = now()
        self._save_after = None if save_minutes is None else 60 * save_minutes
        began = self._saved if began is None else began
        self._end = None if time_limit is None else began + 60 * time_limit
        self._longest = 0.0

    def start_step(self) -> None:
        """Marks the start of a step, so that the time before it is not counted."""
        self._step = self._now()

    def after_step(self) -> Wishes:
        """The requests due after a step: to stop, if another step could exceed the limit."""
        now = self._now()
        self._longest, self._step = max(self._longest, now - self._step), now
        saves = self._save_after is not None and now - self._saved >= self._save_after
        stops = self._end is not None and now + self._longest >= self._end
        return Wishes(saves, stops)

    def saved(self) -> None:
        """Records that a checkpoint was saved."""
        self._saved = self._now()
