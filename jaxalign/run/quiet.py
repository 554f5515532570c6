"""Hides what Orbax, asyncio and TensorStore print about saves whose errors a run reports itself."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from jaxalign.run.storage import failure_of

_LOOP_CLOSED = "Event loop is closed"  # asyncio's words


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Hides the tracebacks of failed saves: the same error is raised, and printed in one line.

    Orbax logs it once per thread, asyncio once per write. For pending writes, TensorStore reports
    through either hook of Python that their event loop is closed.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    unraisable_hook, hook = sys.unraisablehook, sys.excepthook

    def show_unraisable(unraisable: Any) -> None:
        if str(unraisable.exc_value) != _LOOP_CLOSED:
            unraisable_hook(unraisable)

    def show(kind: Any, error: BaseException, traceback: Any) -> None:
        if str(error) != _LOOP_CLOSED:
            hook(kind, error, traceback)

    for logger in loggers:
        logger.addFilter(_no_failed_save)
    sys.unraisablehook, sys.excepthook = show_unraisable, show
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_no_failed_save)
        if sys.unraisablehook is show_unraisable:
            sys.unraisablehook = unraisable_hook
        if sys.excepthook is show:
            sys.excepthook = hook


def _no_failed_save(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return True
    return "orbax" not in record.pathname and failure_of(error) is None


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Hides Orbax's warning that a folder opened for reading is read-only."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
