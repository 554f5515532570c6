"""A time limit for code from users: reward functions, regular expressions, chat templates."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

TEMPLATE_SECONDS = 60.0
"""How long a template may take for one rendering, unless `template_timeout` says otherwise."""

_AGAIN = 1.0  # seconds after which code that caught the alarm is interrupted again


class OutOfTime(BaseException):
    """Code took longer than its limit. Not an `Exception`, so that the code does not catch it."""


def call_within(seconds: float | None, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls a function, and interrupts it with the alarm signal after some seconds.

    Python code, sleeping, waiting for input and `re` are interrupted; native code that ignores
    signals runs to its end. The limit applies only in the main thread, on systems with `setitimer`;
    otherwise there is none. An alarm that was set before continues afterwards.

    Args:
      seconds: wall-clock seconds; None: no limit.
      function: called with the other arguments.

    Raises:
      OutOfTime: the call took longer.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        return function(*args, **kwargs)
    running = True

    def alarm(*_: Any) -> None:
        if running:  # a late alarm must not interrupt later code
            raise OutOfTime

    before, interval = signal.setitimer(signal.ITIMER_REAL, 0.0)
    began = time.monotonic()
    handler = signal.signal(signal.SIGALRM, alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
        try:
            return function(*args, **kwargs)
        finally:
            running = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if before:
            rest = max(before - (time.monotonic() - began), 1e-3)
            signal.setitimer(signal.ITIMER_REAL, rest, interval)
