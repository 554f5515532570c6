"""Publishes a run's folder to a bucket, while the run works in a local copy.

The rest of a run need not know about buckets: the copy is an ordinary folder. A thread uploads
changes, in an order such that nothing incomplete looks complete if the run is killed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import pathlib
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from jaxalign.data.remote import Entry, download_all, explained, list_files, place_of, reason
from jaxalign.hf import checksums
from jaxalign.parallel import distributed
from jaxalign.run.bucket_lock import BucketLock
from jaxalign.run.remote import (
    CHECKPOINTS,
    Sorted,
    local_folder,
    manifest_of,
    sort_files,
    step_of,
)
from jaxalign.run.storage import REMOTE, retry, say

_MARK = ".mirror"
"""A marker file in the copy: if it is gone, somebody removed the copy, not a run its files."""

_UNFINISHED = ".orbax-checkpoint-tmp"
_POLL_SECONDS = 1.0
_PERIOD = 30.0
"""The minimum seconds between two uploads of growing files, such as metrics.jsonl."""
_REST = 20
"""They also wait this multiple of the last upload's time: each rewrites the whole object."""
_SLOW_SECONDS = 30.0
_SMALL = 1 << 20
_THREADS = 8


class Mirror:
    """A folder in a bucket and its copy on this machine.

    On opening, the bucket is authoritative. Once started, the copy is: new files are uploaded, and
    files that disappear are removed from the bucket, provided that they came from there or this
    object uploaded them. Other files in the bucket stay.

    Args:
      folder: the folder's address.
      outputs: names in the folder that a run writes.

    Raises:
      ValueError: on entering, if the folder is in use or access is denied.
    """

    def __init__(self, folder: str, outputs: Iterable[str]):
        self._place = place_of(folder, "run.folder")
        self._folder = local_folder(folder)
        self._outputs = frozenset(outputs)
        self._lock = BucketLock(self._place)
        self._sent: dict[str, tuple[int, int] | None] = {}
        self._steps: dict[int, tuple[int, int]] = {}
        self._cut: dict[str, Entry] = {}
        self._mutex, self._ended = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._due = 0.0

    def __enter__(self) -> Self:
        self._lock.__enter__()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            if self._thread is not None:
                self._ended.set()
                self._thread.join()
                self._publish_last(error)
        finally:
            self._lock.__exit__()

    def _publish_last(self, error: type[BaseException] | None) -> None:
        try:
            self.publish()
        except Exception as failure:
            if error is None or issubclass(error, distributed.Preempted):
                raise
            # Raising it would hide the error that ended the run.
            say(f"{self._place.address} lacks what the run wrote last: {reason(failure)}")

    def pull(self, *, everything: bool) -> None:
        """Makes the copy equal to the bucket.

        Args:
          everything: False: fetch only what shows which outputs exist, to reject or replace them.

        Raises:
          ValueError: reading is not permitted.
        """
        found = sort_files(list_files(self._place))
        plain = found.plain
        if not everything:
            plain = {n: e for n, e in plain.items() if n.split("/")[0] in self._outputs}
        self._clear(found, keep=everything)
        self._sent, self._cut = dict.fromkeys(plain), found.cut
        wanted = {
            name: entry
            for name, entry in plain.items()
            if everything or not name.startswith("model/") or entry.size <= _SMALL
        }
        with self._explained():
            self._download(wanted)
            for step, files in sorted(found.complete.items()):
                self._pull_checkpoint(step, files, everything=everything)
        for name in wanted:
            self._sent[name] = _stamp(self._folder / name)
        self._steps = self._local_steps()

    def start(self) -> None:
        """Starts publishing."""
        if self._cut:
            steps = sorted({str(step_of(name)) for name in self._cut})
            print(
                f"{self._place.address}/{CHECKPOINTS}: the upload of {', '.join(steps)} was cut "
                "off; its files are removed",
                flush=True,
            )
            self._remove(self._cut)
        (self._folder / _MARK).touch()
        self._thread = threading.Thread(target=self._watch, name="jaxalign-mirror", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Uploads all changes and waits.

        Raises:
          StorageError: the bucket cannot be written for half a minute; what was uploaded before is
            intact.
          ValueError: no right to write, or another process took the folder over.
        """
        began = time.monotonic()
        with self._mutex:
            if self._failure is not None:
                raise self._failure
            self._push(plain=True)
        if (waited := time.monotonic() - began) > _SLOW_SECONDS:
            say(
                f"waited {waited:.0f} s for the upload to {self._place.address}: the bucket is "
                "slow; save less often"
            )

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_SECONDS):
            with self._mutex:
                try:
                    self._push(plain=time.monotonic() >= self._due)
                except Exception as error:  # for the next call of `publish`
                    self._failure = error
                    return

    def _push(self, *, plain: bool) -> None:
        """One round. It lists checkpoints before it sends the files that mention their steps."""
        self._lock.check()
        if self._thread is not None and not (self._folder / _MARK).exists():
            raise OSError(
                errno.ENOENT,
                f"the copy of {self._place.address} on this machine is gone; what is in the bucket "
                "stays as it is",
                str(self._folder),
            )
        here = self._local_steps()
        fresh = sorted(step for step, stamp in here.items() if self._steps.get(step) != stamp)
        if plain or fresh:
            began = time.monotonic()
            self._push_files()
            now = time.monotonic()
            self._due = now + max(_PERIOD, _REST * (now - began))
        for step in fresh:
            self._push_checkpoint(step)
        for step in sorted(self._steps.keys() - self._local_steps().keys()):
            self._remove_checkpoint(step)

    def _push_files(self) -> None:
        stamps: dict[str, tuple[int, int]] = {}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            if self._is_plain(name) and path.is_file():
                with contextlib.suppress(FileNotFoundError):
                    stamps[name] = _stamp(path)
        new = {name: stamp for name, stamp in stamps.items() if self._sent.get(name) != stamp}
        # A model is complete once it has its config.json.
        last = {name for name in new if name.endswith("/config.json")}
        for names in (new.keys() - last, last):
            self._upload(names)
        self._sent |= new
        gone = self._sent.keys() - stamps.keys()
        self._remove(gone)
        for name in gone:
            del self._sent[name]

    def _is_plain(self, name: str) -> bool:
        parts = name.split("/")
        hidden = any(part.startswith(".") or _UNFINISHED in part for part in parts)
        return not hidden and step_of(name) is None

    def _local_steps(self) -> dict[int, tuple[int, int]]:
        """The finished checkpoints, each with a stamp that tells it from others of its step."""
        found = {}
        for path in (self._folder / CHECKPOINTS).glob("*"):
            if path.name.isdecimal():
                with contextlib.suppress(FileNotFoundError):  # incomplete, or just being removed
                    found[int(path.name)] = _stamp(path / checksums.NAME)
        return found

    def _push_checkpoint(self, step: int) -> None:
        if step in self._steps:  # a different checkpoint, from a run that went back
            self._remove_checkpoint(step)
        root = self._folder / CHECKPOINTS / str(step)
        stamp = self._local_steps().get(step)
        names = {
            path.relative_to(self._folder).as_posix() for path in root.rglob("*") if path.is_file()
        }
        self._upload(names - {manifest_of(step)})
        whole = stamp is not None and all((self._folder / name).is_file() for name in names)
        if stamp is None or not whole:  # newer checkpoints have replaced it meanwhile
            self._remove(names)
            return
        self._upload([manifest_of(step)])
        self._steps[step] = stamp

    def _remove_checkpoint(self, step: int) -> None:
        self._remove([manifest_of(step)])  # without it the rest does not count
        inner = self._place._replace(path=self._place.of(f"{CHECKPOINTS}/{step}"))
        self._remove(f"{CHECKPOINTS}/{step}/{name}" for name in list_files(inner))
        self._steps.pop(step, None)

    def _pull_checkpoint(self, step: int, files: Mapping[str, Entry], *, everything: bool) -> None:
        manifest = manifest_of(step)
        target = self._folder / CHECKPOINTS / str(step)
        if target.is_dir():
            return
        if everything:
            self._download({name: entry for name, entry in files.items() if name != manifest})
        self._download({manifest: files[manifest]})

    def _clear(self, found: Sorted, *, keep: bool) -> None:
        """Removes files from the copy that the bucket lacks or has with other contents."""
        same = {step for step in found.complete if keep and self._is_same(step)}
        places = [*self._folder.glob("*"), *(self._folder / CHECKPOINTS).glob("*")]
        for path in places:
            if path.parent.name == CHECKPOINTS and path.parent.parent == self._folder:
                keeps = path.name.isdecimal() and int(path.name) in same
            else:
                keeps = path.name.startswith(".lock") or (path.name == CHECKPOINTS and bool(same))
            if keeps:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def _is_same(self, step: int) -> bool:
        """Whether the copy's checkpoint equals the bucket's, by its checksums."""
        local = self._folder / manifest_of(step)
        if not local.is_file():
            return False
        with self._explained():
            return local.read_bytes() == self._place.fs.cat_file(self._place.of(manifest_of(step)))

    def _download(self, files: Mapping[str, Entry]) -> None:
        download_all(self._place, {n: (e, self._folder / n) for n, e in files.items()})

    def _upload(self, names: Iterable[str]) -> None:
        self._all(self._upload_one, names)

    def _upload_one(self, name: str) -> None:
        path = self._folder / name

        def send() -> None:
            if path.is_file():
                self._place.fs.put_file(str(path), self._place.of(name))

        self._try(send, name, lambda: not path.is_file())

    def _remove(self, names: Iterable[str]) -> None:
        def one(name: str) -> None:
            def remove() -> None:
                with contextlib.suppress(FileNotFoundError):
                    self._place.fs.rm_file(self._place.of(name))

            self._try(remove, name, lambda: False)

        self._all(one, names)

    def _all(self, act: Callable[[str], None], names: Iterable[str]) -> None:
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(act, sorted(names)))

    def _try(self, act: Callable[[], Any], name: str, is_over: Callable[[], bool]) -> None:
        """Runs a bucket operation; retries after failures, but not if access is denied."""
        refusals: list[ValueError] = []

        def attempt() -> None:
            try:
                with self._explained():
                    act()
            except ValueError as error:
                refusals.append(error)
            except Exception as error:  # every file system has its own errors
                if not is_over():
                    say(f"{self._place.address}/{name}: {reason(error)}")
                    raise OSError(REMOTE, reason(error)) from error

        retry(attempt, f"{self._place.address}/{name}", self._folder, safe=self._what_is_safe)
        if refusals:
            raise refusals[0]

    def _what_is_safe(self) -> str:
        if not self._steps:
            return f"No checkpoint is in the bucket yet; the run's files are in {self._folder}"
        return (
            f"The checkpoint of step {max(self._steps)} is whole in the bucket: run.resume=true "
            "goes on from there, and nothing before it is lost"
        )

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        with explained(self._place.address, self._place.option):
            yield


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    """Size and time of a file, to detect changes."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns
