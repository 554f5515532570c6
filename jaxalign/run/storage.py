"""Handles failing storage: bounded retries with back-off, then an error that says what is safe."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

DELAYS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds between tries: half a minute in total, about as long as a server takes to restart."""

REMOTE = getattr(errno, "EREMOTEIO", errno.ECONNABORTED)
"""A placeholder number for a bucket's own errors."""

_FULL = "make room"
_REMEDIES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: f"{_FULL} within the quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it writable",
    errno.EPERM: "make it writable",
    errno.ENOENT: "bring the folder back",
    errno.ENOTDIR: "bring the folder back",
    errno.EIO: "look at the disk",
    errno.ESTALE: "mount it again",
    errno.ENOTCONN: "mount it again",
    errno.ENODEV: "mount it again",
    errno.ETIMEDOUT: "look at the file server",
    REMOTE: "look at the bucket and the network",
    errno.EHOSTDOWN: "look at the file server",
    errno.EBUSY: "close what uses it",
}
"""Temporary storage errors → their remedies."""

_ALSO_OF_INPUT = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EBUSY}
"""The errors among them that a wrong path causes too."""


class StorageError(OSError):
    """Storage failed for longer than the retries took; everything written before is intact."""

    exit_status = 74
    """EX_IOERR. Not 75, because batch systems restart such a job at once."""


def failure_of(error: BaseException) -> int | None:
    """The storage error that caused an exception.

    TensorStore passes on the system's message as text, and Orbax wraps it in other exceptions.

    Returns:
      The error's number, or None if something else went wrong.
    """
    for each in _chain(error):
        if isinstance(each, OSError) and each.errno in _REMEDIES:
            return each.errno
        text = str(each)
        for number in _REMEDIES:
            if not isinstance(each, OSError) and os.strerror(number) in text:
                return number
    return None


def describe(error: Exception) -> tuple[str, int]:
    """The message for an error that ends a command, and the exit status.

    The system's "[Errno 28] No space left on device" names no remedy, so one is added. A missing or
    unreadable file is the caller's to fix, and the message names the file.
    """
    number = error.errno if isinstance(error, OSError) else None
    place = error.filename if isinstance(error, OSError) else None
    of_input = place is not None and number in _ALSO_OF_INPUT
    if isinstance(error, StorageError) or number is None or number not in _REMEDIES or of_input:
        return str(error), getattr(error, "exit_status", 2)
    name = "" if place is None else f"{place}: "
    again = "run the same command again (with run.resume=auto, if it trains)"
    reason = f"{name}{os.strerror(number)}. {_capital(_REMEDIES[number])}"
    return f"{reason}, then {again}", StorageError.exit_status


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def retry(
    attempt: Callable[[], T],
    what: str,
    folder: pathlib.Path,
    *,
    safe: Callable[[], str] = str,
    delays: tuple[float, ...] | None = None,
) -> T:
    """Runs a function that writes to storage; while storage fails, retries after each of `delays`.

    Args:
      attempt: the function; it must leave nothing half done.
      what: what it writes, for messages, such as "runs/x/metrics.jsonl".
      folder: where it writes.
      safe: returns a sentence about what is safe, for the final message.
      delays: seconds to wait before each retry; None: `DELAYS`.

    Raises:
      StorageError: storage still fails after the last try.
    """
    delays = DELAYS if delays is None else delays
    for number, delay in enumerate((*delays, None), start=1):
        try:
            return attempt()
        except Exception as error:
            failure = failure_of(error)
            if failure is None:
                raise
            reason = os.strerror(failure)
            if delay is None:
                raise StorageError(
                    f"{what} could not be written: {reason}{_free(folder, failure)}; "
                    f"tried {number} times in {sum(delays):g} s. {_capital(_REMEDIES[failure])}"
                    f", then go on. {safe()}".rstrip()
                ) from error
            say(f"{what}: {reason}; trying again in {delay:g} s")
            _sleep(delay)
    raise AssertionError("the last try returns or raises")


_sleep = time.sleep


def say(text: str) -> None:
    """Prints a line if possible: the output may go to the full disk."""
    with contextlib.suppress(OSError):
        tqdm.write(text)
        sys.stdout.flush()


def _free(folder: pathlib.Path, failure: int) -> str:
    """The free space, if lack of space is the problem."""
    if failure not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    try:
        return f" ({shutil.disk_usage(folder).free / 2**20:,.1f} MiB free)"
    except OSError:
        return ""


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def what_is_safe(folder: pathlib.Path) -> str:
    """A sentence about the newest complete checkpoint in a folder of checkpoints."""
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    if not steps:
        return "There is no complete checkpoint yet: run.resume=auto starts again"
    return (
        f"The checkpoint of step {max(steps)} is complete: run.resume=true goes on from there, "
        "and nothing before it is lost"
    )


MOVED = "Nothing in it has changed: run.resume=auto goes on from its newest checkpoint"
"""What is safe if the whole folder was moved away."""


class Place:
    """A folder, which may be moved away while a run writes to it.

    What creates missing folders would then start another one in its place.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._was = folder.stat() if folder.is_dir() else None

    def is_there(self) -> bool:
        """Whether the folder is there, and the one it was."""
        try:
            now = self._folder.stat()
        except OSError:
            return False
        return self._was is None or os.path.samestat(now, self._was)


class LineFile:
    """A text file for appending whole lines: each write arrives completely or not at all.

    Writes are not buffered. If the file was removed or replaced meanwhile, the write goes to the
    current file of that name, so that no line is lost in a deleted file. If its folder was moved
    away, the write fails until it is back.

    Args:
      path: the file; its folder must exist.
      safe: see `retry`.
    """

    def __init__(self, path: pathlib.Path, safe: Callable[[], str] = str):
        self._path, self._safe = path, safe
        self._place = Place(path.parent)
        self._file = path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Appends text, which ends with a newline.

        Raises:
          StorageError: see `retry`.
        """
        data = text.encode()

        def safe() -> str:
            return self._safe() if self._place.is_there() else MOVED

        retry(lambda: self._append(data), str(self._path), self._path.parent, safe=safe)

    def flush(self) -> None:
        """Does nothing, because writes are not buffered."""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, data: bytes) -> None:
        if not self._has_name():
            if not (self._path.exists() or self._place.is_there()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path.parent)
            fresh = self._path.open("ab", buffering=0)
            self._file.close()
            self._file = fresh
        start, rest = os.fstat(self._file.fileno()).st_size, memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(start)  # needs no space
            raise

    def _has_name(self) -> bool:
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False
