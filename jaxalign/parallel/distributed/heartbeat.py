"""When one process fails or is lost, all stop, each with a message that says which one and why.

JAX's service notices by itself when a process sends no more signs of life, and then ends the
others, but knows processes by number only, and hears nothing of what went wrong. So each process
has a thread that waits for bad news and gives signs of life of its own, which process 0 watches.
It is a little quicker than the service, which stays behind it for machines that hang altogether.

The service lives in process 0. Without it, JAX aborts the other processes within milliseconds, by
C++ code that leaves no thread of Python the time to speak; so the last word is had by a handler of
that very abort.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from jaxalign.parallel.distributed.collectives import barrier
from jaxalign.parallel.distributed.service import PREFIX, announce, client, reachable, seconds, who

LOST = "JAXALIGN_LOST_SECONDS"
"""After how long without a sign of life a process counts as lost; by default 30 seconds."""

_FAILED = f"{PREFIX}/failed"
_NEWS = f"{PREFIX}/news"
_BEAT = f"{PREFIX}/beat"
_DONE, _LEFT = "done", "left"
_QUIET = {_DONE, _LEFT}  # of whom no further sign of life is wanted
_OWN = "RESOURCE_EXHAUSTED"  # what XLA says of this process alone: its memory is full
_TELLING = 10.0  # seconds in which the others hear of a failure here
_LEAVING = 5.0  # seconds in which the others say why they stop


def lost_after() -> int:
    """Seconds after which a silent process counts as lost."""
    return seconds(LOST, 30)


class Watch:
    """The thread of one process.

    Args:
      service: the key-value store.
      index: of this process.
      count: of processes.
      patience: seconds without a sign of life after which a process counts as lost.
      stop: ends this process, given the message; replaced in tests.
    """

    def __init__(
        self,
        service: Any,
        index: int,
        count: int,
        patience: float,
        stop: Callable[[str], None],
    ):
        self._service, self._index, self._count = service, index, count
        self._patience, self._stop = patience, stop
        self._pause = max(1, round(1000 * patience / 6))  # milliseconds
        self._seen: dict[int, tuple[str, float]] = {}
        self._looked = self._awake = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxalign-watch", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._beat("0")
        self._thread.start()

    def end(self) -> None:
        """This process is done: its silence is no loss any more."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(Exception):
            self._beat(_DONE)
            # Wakes the thread. Python must not end while it is within the client.
            self._service.key_value_set(f"{_NEWS}/{self._index}", "", allow_overwrite=True)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_TELLING)

    def wait(self) -> None:
        """Gives the thread the time to notice the loss of another process."""
        self._thread.join(1.5 * self._patience)

    def fail(self, message: str) -> None:
        """Tells the others that this process has failed, and waits until they have heard it."""
        if self._ended.is_set():
            return
        self.end()  # first: our own thread must not end us for this message
        self._tell(message)
        until = time.monotonic() + _TELLING
        while time.monotonic() < until:
            try:
                beats = dict(self._service.key_value_dir_get(_BEAT))
            except Exception:
                return  # process 0 is gone, so there is nobody to tell
            if len(beats) == self._count and set(beats.values()) <= _QUIET:
                return
            time.sleep(0.1)

    def leave(self) -> None:
        """Says that this process has had its last word; process 0 waits for those of the others.

        It holds the service, without which JAX aborts them before they have spoken.
        """
        until = time.monotonic() + _LEAVING
        with contextlib.suppress(Exception):
            self._beat(_LEFT)
            while self._index == 0 and time.monotonic() < until:
                if set(dict(self._service.key_value_dir_get(_BEAT)).values()) <= {_LEFT}:
                    return
                time.sleep(0.1)

    def _tell(self, message: str) -> None:
        with contextlib.suppress(Exception):
            # Whoever fails first is the one to be named: for the next one this is refused.
            self._service.key_value_set(_FAILED, message)
            for index in range(self._count):
                self._service.key_value_set(f"{_NEWS}/{index}", message, allow_overwrite=True)

    def _beat(self, text: str) -> None:
        self._service.key_value_set(f"{_BEAT}/{self._index}", text, allow_overwrite=True)

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            number += 1
            message = None
            try:
                self._beat(str(number))
                if self._index == 0:
                    self._look()
                news = f"{_NEWS}/{self._index}"
                message = self._service.blocking_key_value_get(news, self._pause)
            except Exception as error:
                if self._ended.is_set() or "DEADLINE_EXCEEDED" in str(error):
                    continue
                # Either the store is gone with process 0, or JAX is about to end this process.
                message = _first_is_lost() if not reachable() else self.silent()
                self._ended.wait(0.0 if message else 1.0)
            if self._ended.is_set() or message is None:
                continue
            self.end()
            self._stop(message)
            return

    def _look(self) -> None:
        """Process 0: who has been silent for too long?"""
        now = time.monotonic()
        if now - self._looked > self._patience / 2:
            self._awake = now  # it was this process that slept, or its machine: hear them anew
        self._looked = now
        for key, text in self._service.key_value_dir_get(_BEAT):
            index = int(key.rsplit("/", 1)[1])
            before = self._seen.get(index)
            if before is None or before[0] != text:
                self._seen[index] = (text, now)
            elif text not in _QUIET and now - max(before[1], self._awake) > self._patience:
                self._tell(_is_silent(index, now - before[1]))
                return

    def silent(self) -> str | None:
        """On process 0: a message about one that has been silent for long, if there is one."""
        now = time.monotonic()
        for index, (text, since) in self._seen.items():
            if text not in _QUIET and now - since > self._patience:
                return _is_silent(index, now - since)
        return None


def _is_silent(index: int, silence: float) -> str:
    return (
        f"{who(index)} is lost: no sign of life for {silence:.0f} s; it was killed, or its machine "
        "hangs or cannot be reached"
    )


def _first_is_lost() -> str:
    return f"{who(0)} is lost: it was killed, or its machine cannot be reached"


_watch: Watch | None = None
_broken = False


def begin() -> None:
    """Starts to watch, once; alone, does nothing."""
    global _watch
    if _watch is not None or client() is None or jax.process_count() == 1:
        return
    announce()
    barrier("joining")
    for index in range(jax.process_count()):
        who(index)  # must be known when the store is gone
    _watch = Watch(client(), jax.process_index(), jax.process_count(), lost_after(), _stop)
    _watch.start()
    ctypes.CDLL(None).signal(signal.SIGABRT, _ABORTED)
    # Before JAX's own, which waits for all processes: that one would wait for the dead as well.
    atexit.register(_at_exit)


def _stop(message: str) -> None:
    """Ends this process at once: its main thread may hang in a collective with a dead process."""
    _say(message)
    if _watch is not None and reachable():
        _watch.leave()
    os._exit(1)


def _say(message: str) -> None:
    text = f"jaxalign: {message}. This is {who(jax.process_index())}, which stops too.\n"
    os.write(2, text.encode())


def _aborted(number: int) -> None:
    """JAX aborts this process; where that is for the loss of another, says so."""
    message = None
    if jax.process_index() == 0:
        message = None if _watch is None else _watch.silent()
    elif not reachable():
        message = _first_is_lost()
    if message is not None:
        _say(message)
        os._exit(1)


# By ctypes: a handler set by Python's `signal` runs when the main thread next does, which is never.
_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)


def _at_exit() -> None:
    if _watch is not None:
        _watch.end()
    if _broken:
        leave(1)


def leave(status: int) -> None:
    """Ends this process if the job is broken, without waiting for processes that are dead."""
    if _broken:
        sys.stdout.flush()
        sys.stderr.flush()
        if _watch is not None:
            _watch.leave()
        os._exit(status)


class Preempted(RuntimeError):
    """The scheduler asks for the machines; raised on all processes after the same step."""


def broken() -> bool:
    """Whether the job has failed here: nothing that wants the other processes can succeed."""
    return _broken


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Runs the body; where it fails on one process, the others stop with that one's message.

    The exception goes on its way on the process that failed. `Preempted` is no failure.
    """
    global _broken
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        if _watch is not None and not _broken:
            if isinstance(error, jax.errors.JaxRuntimeError) and _OWN not in str(error):
                # A collective fails where another process is gone: the watch will say which, and
                # end this process.
                _watch.wait()
            _broken = True
            summary = "".join(traceback.format_exception_only(error)).strip()
            _watch.fail(f"{who(jax.process_index())} failed: {summary}")
        raise


def preempted(step: int) -> bool:
    """Whether all processes are to save and stop after this step, as one of them was told to.

    With several processes, SIGTERM (which schedulers send before they take a machine away) does
    not end a process: JAX passes it on to all, and finds a step that all have yet to reach. Alone,
    SIGTERM does what it always does.

    Args:
      step: counts up, the same on all processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
