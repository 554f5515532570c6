"""A time limit for code that people bring: reward functions and regular expressions."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_AGAIN = 1.0  # seconds after which code that caught the alarm is interrupted anew


class OutOfTime(BaseException):
    """Code took longer than its limit. No `Exception`, so that the code does not catch it."""


def call_within(seconds: float | None, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls a function, which the alarm signal interrupts after some seconds.

    Python code, sleeping, waiting for input and `re` are interrupted; native code that does not
    look for signals ends first. Only the main thread has such a limit, and only on systems with
    `setitimer`; elsewhere there is none. An alarm that was set before goes on afterwards.

    Args:
      seconds: of real time; None: no limit.
      function: called with the other arguments.

    Raises:
      OutOfTime: the time is over.
    """
    main = threading.current_thread() is threading.main_thread()
    if seconds is None or not main or not hasattr(signal, "setitimer"):
        return function(*args, **kwargs)
    running = True

    def alarm(*_: Any) -> None:
        if running:  # a late one must not hit what comes after
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


def check_timeout(kind: str, timeout: float | None) -> None:
    """Checks the option `timeout` of a reward.

    Raises:
      ValueError: it is no positive number of seconds.
    """
    if timeout is not None and not 0 < timeout < math.inf:
        raise ValueError(
            f"{kind} reward timeout={timeout}: wanted positive seconds, or null for no limit"
        )
