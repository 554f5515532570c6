"""Heartbeats: when one process fails or is lost, all stop and name the process and the cause.

JAX's coordination service also detects a lost process and ends the others. It knows only process
numbers and no error messages. So each process runs a thread that publishes heartbeats and blocks on
failure reports; process 0 checks the heartbeats. This detection is a little faster than the
service's, which remains as a fallback for machines that hang altogether.

The service lives in process 0. If that process dies, JAX's C++ client aborts the others within
milliseconds, before any Python thread can run. A SIGABRT handler prints the message in that case.
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
"""Seconds without a heartbeat after which a process counts as lost; 30 by default."""

_FAILED = f"{PREFIX}/failed"
_REPORT = f"{PREFIX}/news"
_BEAT = f"{PREFIX}/beat"
_DONE, _LEFT = "done", "left"
_FINAL = {_DONE, _LEFT}  # final heartbeats: silence after one of these is not a loss
_LOCAL_ERROR = "RESOURCE_EXHAUSTED"  # XLA ran out of memory here: no other process is to blame
_REPORT_SECONDS = 10.0  # time for the others to receive a failure report
_EXIT_SECONDS = 5.0  # time for the others to print their message


def lost_after() -> int:
    """Seconds without a heartbeat after which a process counts as lost."""
    return seconds(LOST, 30)


class Heartbeat:
    """The heartbeat thread of one process.

    Args:
      service: the key-value store.
      index: the index of this process.
      count: number of processes.
      patience: seconds without a heartbeat after which a process counts as lost.
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
        self._last_beats: dict[int, tuple[str, float]] = {}  # process → (heartbeat, time)
        self._checked = self._resumed = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxalign-heartbeat", daemon=True)

    def start(self) -> None:
        """Publishes the first heartbeat and starts the thread."""
        self._beat("0")
        self._thread.start()

    def end(self) -> None:
        """Publishes that this process is done (so its silence is no loss); joins the thread."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(Exception):
            self._beat(_DONE)
            # Wakes the thread: the interpreter must not shut down while it is inside the client.
            self._service.key_value_set(f"{_REPORT}/{self._index}", "", allow_overwrite=True)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(_REPORT_SECONDS)

    def wait(self) -> None:
        """Blocks long enough for the thread to detect the loss of another process."""
        self._thread.join(1.5 * self._patience)

    def fail(self, message: str) -> None:
        """Reports this process's failure, and waits until the others have received the report."""
        if self._ended.is_set():
            return
        self.end()  # first: our own thread must not end this process for this report
        self._report(message)
        deadline = time.monotonic() + _REPORT_SECONDS
        while time.monotonic() < deadline:
            try:
                beats = dict(self._service.key_value_dir_get(_BEAT))
            except Exception:
                return  # process 0 is gone, and the store with it
            if len(beats) == self._count and set(beats.values()) <= _FINAL:
                return
            time.sleep(0.1)

    def leave(self) -> None:
        """Publishes that this process has printed its message; process 0 waits for the others.

        Process 0 hosts the service. If it exits first, JAX aborts the others before they print.
        """
        deadline = time.monotonic() + _EXIT_SECONDS
        with contextlib.suppress(Exception):
            self._beat(_LEFT)
            while self._index == 0 and time.monotonic() < deadline:
                if set(dict(self._service.key_value_dir_get(_BEAT)).values()) <= {_LEFT}:
                    return
                time.sleep(0.1)

    def _report(self, message: str) -> None:
        with contextlib.suppress(Exception):
            # Without allow_overwrite, so that only the first failure is ever reported.
            self._service.key_value_set(_FAILED, message)
            for index in range(self._count):
                self._service.key_value_set(f"{_REPORT}/{index}", message, allow_overwrite=True)

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
                    self._check_beats()
                key = f"{_REPORT}/{self._index}"
                message = self._service.blocking_key_value_get(key, self._pause)
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

    def _check_beats(self) -> None:
        """On process 0: reports a process without a heartbeat for `patience` seconds."""
        now = time.monotonic()
        if now - self._checked > self._patience / 2:
            # This process itself was suspended: count the others' silence from now on.
            self._resumed = now
        self._checked = now
        for key, text in self._service.key_value_dir_get(_BEAT):
            index = int(key.rsplit("/", 1)[1])
            last = self._last_beats.get(index)
            if last is None or last[0] != text:
                self._last_beats[index] = (text, now)
            elif text not in _FINAL and now - max(last[1], self._resumed) > self._patience:
                self._report(_is_silent(index, now - last[1]))
                return

    def silent(self) -> str | None:
        """On process 0: the message about a process without heartbeats; None if all are alive."""
        now = time.monotonic()
        for index, (text, since) in self._last_beats.items():
            if text not in _FINAL and now - since > self._patience:
                return _is_silent(index, now - since)
        return None


def _is_silent(index: int, silence: float) -> str:
    return (
        f"{who(index)} is lost: no sign of life for {silence:.0f} s; it was killed, or its machine "
        "hangs or cannot be reached"
    )


def _first_is_lost() -> str:
    return f"{who(0)} is lost: it was killed, or its machine cannot be reached"


_heartbeat: Heartbeat | None = None
_failed = False


def begin() -> None:
    """Starts this process's heartbeat, once; with one process, does nothing."""
    global _heartbeat
    if _heartbeat is not None or client() is None or jax.process_count() == 1:
        return
    announce()
    barrier("joining")
    for index in range(jax.process_count()):
        who(index)  # cached now, for messages after the store is gone
    _heartbeat = Heartbeat(client(), jax.process_index(), jax.process_count(), lost_after(), _stop)
    _heartbeat.start()
    ctypes.CDLL(None).signal(signal.SIGABRT, _ABORTED)
    # Runs before JAX's own exit handler, which would wait for dead processes too.
    atexit.register(_at_exit)


def _stop(message: str) -> None:
    """Ends this process at once: its main thread may hang in a collective with a dead process."""
    _print(message)
    if _heartbeat is not None and reachable():
        _heartbeat.leave()
    os._exit(1)


def _print(message: str) -> None:
    text = f"jaxalign: {message}. This is {who(jax.process_index())}, which stops too.\n"
    os.write(2, text.encode())


def _aborted(number: int) -> None:
    """SIGABRT handler: if JAX aborts because another process is lost, prints which one."""
    message = None
    if jax.process_index() == 0:
        message = None if _heartbeat is None else _heartbeat.silent()
    elif not reachable():
        message = _first_is_lost()
    if message is not None:
        _print(message)
        os._exit(1)


# Installed by ctypes: Python runs `signal` handlers between bytecodes of the main thread, which
# executes no bytecode after an abort.
_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)


def _at_exit() -> None:
    if _heartbeat is not None:
        _heartbeat.end()
    if _failed:
        exit_if_failed(1)


def exit_if_failed(status: int) -> None:
    """Exits at once if the job has failed here, without waiting for dead processes."""
    if _failed:
        sys.stdout.flush()
        sys.stderr.flush()
        if _heartbeat is not None:
            _heartbeat.leave()
        os._exit(status)


class Preempted(RuntimeError):
    """The scheduler wants the machines back; raised on all processes after the same step."""


def job_failed() -> bool:
    """Whether the job has failed here: any collective with the other processes would hang."""
    return _failed


@contextlib.contextmanager
def guard() -> Iterator[None]:
    """Runs the body; if it raises on one process, the others stop with that process's message.

    The exception propagates on the process that raised it. `Preempted` is not a failure.
    """
    global _failed
    try:
        yield
    except Preempted:
        raise
    except BaseException as error:
        if _heartbeat is not None and not _failed:
            if isinstance(error, jax.errors.JaxRuntimeError) and _LOCAL_ERROR not in str(error):
                # A collective also fails if another process is gone. In that case the heartbeat
                # thread names that process and ends this one during the wait.
                _heartbeat.wait()
            _failed = True
            summary = "".join(traceback.format_exception_only(error)).strip()
            _heartbeat.fail(f"{who(jax.process_index())} failed: {summary}")
        raise


def preempted(step: int) -> bool:
    """Whether all processes must save and stop after this step, because one received SIGTERM.

    Schedulers send SIGTERM before they take a machine away. With several processes it does not end
    the process: JAX forwards it to all and agrees on a step that none has reached yet. With one
    process, SIGTERM keeps its default behaviour.

    Args:
      step: counts up, equal on all processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)
