"""A lock for a run's folder: it names its process, and is taken over once that has died."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from typing import Any, Self

from jaxalign.data.bounds import read_json_file

LOCK = ".lock"
"""The lock's name in the run's folder."""

STALE_SECONDS = 180.0
"""Silence after which the lock of a process on another host counts as left behind. File systems
over the network may show a renewal a minute late."""

_BEAT_SECONDS = 10.0
_POLL_SECONDS = 1.0
_NAMESPACE = "/proc/self/ns/pid"
_BOOT_ID = pathlib.Path("/proc/sys/kernel/random/boot_id")


class FolderLock:
    """Context that locks a folder, and creates it if needed.

    The lock is a file with the host, the process id and its start time. If a process of this host
    is gone, or another process has its id, the lock is invalid. For another host or container the
    file's modification time decides, which the owner renews.

    Args:
      folder: the run's folder.

    Raises:
      ValueError: on entering, if another process has the folder, or it is a file.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder, self._path = folder, folder / LOCK
        self._token = secrets.token_hex(8)
        self._made: list[pathlib.Path] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="jaxalign-lock", daemon=True)

    def __enter__(self) -> Self:
        for parent in (self._folder, *self._folder.parents):
            if parent.exists():
                break
            self._made.append(parent)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            where = "it" if self._folder.exists() else f"{self._made[-1].parent}"
            raise ValueError(
                f"run.folder={str(self._folder)!r}: {where} is a file; wanted a folder"
            ) from error
        try:
            self._acquire()
        except BaseException:
            self._tidy()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        owner = _read(self._path)
        if owner is not None and owner.get("token") == self._token:
            self._path.unlink(missing_ok=True)
        self._tidy()

    def _acquire(self) -> None:
        for _ in range(3):
            with contextlib.suppress(FileExistsError):
                self._write()
                return
            owner = _read(self._path)
            if owner is None:
                continue  # it disappeared just now
            if not self._left_behind(owner):
                if not self._path.exists():
                    continue  # released while we waited
                break
            print(f"{self._path}: {named(owner)} is gone; its lock is taken over", flush=True)
            self._take_away(owner)
        owner = _read(self._path)
        raise ValueError(
            f"run.folder={str(self._folder)!r} is in use by {named(owner or {})}; wait for it or "
            f"choose another folder. If that process is gone, remove {self._path}"
        )

    def _write(self) -> None:
        """Creates the lock atomically: an empty lock would have no owner."""
        rest = json.dumps(identity() | {"token": self._token}).encode() + b"\n"
        with self._path.open("xb", buffering=0) as file:
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                self._path.unlink()
                raise OSError(error.errno, error.strerror, str(self._path)) from error

    def _left_behind(self, owner: dict[str, Any]) -> bool:
        """Whether a lock's process has died; may wait for a renewal."""
        died = has_died(owner)
        return self._falls_silent(owner) if died is None else died

    def _falls_silent(self, owner: dict[str, Any]) -> bool:
        """Waits until the lock is renewed or released (False), or is too old (True)."""
        now, renewed, waits = self._folder / f"{LOCK}.{self._token}", None, False
        try:
            while True:
                # Both times are the file system's: the hosts' clocks may differ.
                now.touch()
                last = self._path.stat().st_mtime
                renewed = last if renewed is None else renewed
                if last != renewed:
                    return False
                if now.stat().st_mtime - last > STALE_SECONDS:
                    return True
                if not waits:
                    waits = True
                    limit = f"{STALE_SECONDS:g} s"
                    print(f"{self._path}: waiting for a sign of {named(owner)}, up to {limit}")
                time.sleep(_POLL_SECONDS)
        except FileNotFoundError:
            return False
        finally:
            now.unlink(missing_ok=True)

    def _take_away(self, owner: dict[str, Any]) -> None:
        """Removes an abandoned lock, unless another process was faster."""
        aside = self._folder / f"{LOCK}.{self._token}.old"
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            if _read(aside) != owner:  # the lock of a faster process: put it back
                with contextlib.suppress(OSError):
                    os.link(aside, self._path)
            aside.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _tidy(self) -> None:
        """Removes the folders created here, if the run left nothing in them."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def owner_of(folder: pathlib.Path) -> str | None:
    """The process that has a folder, according to its lock; None if none has. It does not lock."""
    owner = _read(folder / LOCK)
    return None if owner is None else named(owner)


def identity() -> dict[str, Any]:
    """The identity of this process."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": _began(os.getpid()),
        "namespace": os.readlink(_NAMESPACE) if os.path.islink(_NAMESPACE) else None,
        "boot": _BOOT_ID.read_text(encoding="utf-8").strip() if _BOOT_ID.is_file() else None,
        "since": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


_identity = identity


def has_died(owner: dict[str, Any]) -> bool | None:
    """Whether a lock's process is gone; None if this cannot be determined here."""
    here = identity()
    if owner.get("host") == here["host"] and owner.get("boot") != here["boot"]:
        return True  # the machine was rebooted, or another machine has its name
    if owner.get("host") != here["host"] or owner.get("namespace") != here["namespace"]:
        return None
    pid = owner.get("pid")
    return not (isinstance(pid, int) and _is_process(pid, owner.get("began")))


def _stat(pid: int) -> list[str] | None:
    """State, parent … of a process from Linux's /proc; None if there is no such file."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the name, in brackets, may contain spaces


def _began(pid: int) -> str | None:
    """When a process began, in ticks since boot; None if unknown."""
    stat = _stat(pid)
    return None if stat is None else stat[19]


def _is_process(pid: int, began: str | None) -> bool:
    """Whether the process with this start time still runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    stat = _stat(pid)
    return stat is None or (stat[0] not in "ZX" and began in (None, stat[19]))


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """The contents of a lock; {} if they cannot be read, None if there is no lock."""
    for _ in range(2):
        try:
            owner = read_json_file(path)
            return owner if isinstance(owner, dict) else {}
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            time.sleep(0.05)
    return {}


def named(owner: dict[str, Any]) -> str:
    """The process that a lock names, for messages."""
    return (
        f"process {owner.get('pid', '?')} on {owner.get('host', '?')}, since "
        f"{owner.get('since', '?')}"
    )
