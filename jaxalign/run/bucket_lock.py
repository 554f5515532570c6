"""A lock for a run's folder in a bucket: an object that names its owner and is renewed."""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
import time
from typing import Any, Self

from jaxalign.data.bounds import parse_json
from jaxalign.data.remote import Place, explained
from jaxalign.run.lock import LOCK, STALE_SECONDS, has_died, identity, named

_BEAT_SECONDS = 20.0
_POLL_SECONDS = 2.0
_SETTLE_SECONDS = 0.5
"""After it was written the lock is read again, since some storage cannot refuse a second writer."""


class BucketLock:
    """Context that locks a folder in a bucket.

    If the storage supports create-if-absent (GCS, S3), this uses it. Otherwise the lock is written
    and read back, and a process that finds another's name gives up. The owner counts its renewals
    in the object. A lock that is not renewed for `STALE_SECONDS`, or whose process has died on this
    machine, is taken over.

    Args:
      place: the run's folder.

    Raises:
      ValueError: on entering, if another process holds the lock or writing is not permitted.
    """

    def __init__(self, place: Place):
        self._place, self._path = place, place.of(LOCK)
        self._token, self._beats = secrets.token_hex(8), 0
        self._ended, self._lost = threading.Event(), False
        self._thread = threading.Thread(target=self._beat, name="jaxalign-bucket-lock", daemon=True)

    def __enter__(self) -> Self:
        with explained(self._place.address, self._place.option):
            self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # the next process takes it over
            if self._is_ours():
                self._place.fs.rm_file(self._path)

    def check(self) -> None:
        """Raises ValueError if another process has taken the folder over."""
        if self._lost:
            raise ValueError(
                f"{self._place.option}={self._place.address!r}: another process took the folder "
                "over, as this one gave no sign for too long; nothing more is written there"
            )

    def _acquire(self) -> None:
        for _ in range(3):
            if self._make():
                return
            owner = self._read()
            if owner is None:
                continue  # it disappeared just now
            if not self._left_behind(owner):
                if self._read() is None:
                    continue  # released while we waited
                break
            place = f"{self._place.address}/{LOCK}"
            print(f"{place}: {named(owner)} is gone; its lock is taken over", flush=True)
            if self._read() == owner:
                with contextlib.suppress(FileNotFoundError):
                    self._place.fs.rm_file(self._path)
        raise ValueError(
            f"{self._place.option}={self._place.address!r} is in use by "
            f"{named(self._read() or {})}; wait for it or choose another folder. If that process "
            f"is gone, remove {self._place.address}/{LOCK}"
        )

    def _make(self) -> bool:
        """Creates the lock if there is none; returns whether we own it."""
        fs = self._place.fs
        fs.invalidate_cache()
        if fs.exists(self._path):
            return False
        try:
            fs.pipe_file(self._path, self._text(), mode="create")
        except FileExistsError:
            return False
        except (TypeError, NotImplementedError):  # from storage without that mode
            fs.pipe_file(self._path, self._text())
        time.sleep(_SETTLE_SECONDS)
        return self._is_ours()

    def _text(self) -> bytes:
        return json.dumps(identity() | {"token": self._token, "beats": self._beats}).encode()

    def _read(self) -> dict[str, Any] | None:
        """The lock's content; {} if it is damaged, None if there is no lock."""
        try:
            self._place.fs.invalidate_cache()
            owner = parse_json(self._place.fs.cat_file(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _is_ours(self) -> bool:
        owner = self._read()
        return owner is not None and owner.get("token") == self._token

    def _left_behind(self, owner: dict[str, Any]) -> bool:
        """Whether a lock's process has died; may wait for a renewal."""
        boot = identity()["boot"]  # hosts may share a name: only this is sure
        died = has_died(owner) if boot is not None and owner.get("boot") == boot else None
        return self._falls_silent(owner) if died is None else died

    def _falls_silent(self, owner: dict[str, Any]) -> bool:
        """Waits until the lock is renewed or released (False), or has become stale (True)."""
        place = f"{self._place.address}/{LOCK}"
        print(
            f"{place}: waiting for a sign of {named(owner)}, up to {STALE_SECONDS:g} s", flush=True
        )
        until = time.monotonic() + STALE_SECONDS
        while time.monotonic() < until:
            time.sleep(_POLL_SECONDS)
            if self._read() != owner:
                return False
        return True

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(Exception):  # the next renewal may arrive
                owner = self._read()
                if owner and owner.get("token") != self._token:
                    self._lost = True
                    return
                self._beats += 1
                self._place.fs.pipe_file(self._path, self._text())
