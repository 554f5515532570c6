"""Stopping a run that is alone: SIGTERM and Ctrl-C end it after the step under way.

With several processes SIGTERM is JAX's business, see `parallel.distributed.preempted`.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Which signal asked the run to stop, if any did.

    Attributes:
      signal: its name ("SIGTERM", "SIGINT"), or None.
    """

    signal: str | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Notes the first SIGTERM or Ctrl-C instead of dying of it; a second one acts as usual.

    Does nothing with several processes, or outside the main thread, where Python allows no signal
    handlers.
    """
    request = StopRequest()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number).name
        restore()

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
