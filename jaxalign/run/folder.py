"""A run's folder: its owner, its contents, and whether the run resumes from it."""

from __future__ import annotations

import contextlib
import datetime
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from jaxalign.data.paths import check_free, is_empty
from jaxalign.data.remote import is_address
from jaxalign.parallel import distributed
from jaxalign.run.changes import Changes, config_changes, input_changes, length_change
from jaxalign.run.config.base import Run
from jaxalign.run.inputs import DAY, file_inputs, recorded_day, source_paths
from jaxalign.run.lock import FolderLock
from jaxalign.run.mirror import Mirror
from jaxalign.run.record import (
    CONFIG,
    RECORD,
    VERSIONS,
    environment_changes,
    is_ours,
    read_record,
    set_aside,
    write_record,
)
from jaxalign.run.remote import below, is_inside, local_folder
from jaxalign.run.tasks.task import Task
from jaxalign.run.usage import USAGE

CHECKPOINTS, MODEL = "checkpoints", "model"
_OUTPUTS = (
    *(CHECKPOINTS, MODEL, RECORD, VERSIONS, "metrics.jsonl"),
    *("evaluation.json", "rollouts.jsonl", "histograms.jsonl", "trackers.json", "tensorboard"),
    USAGE,
)
"""The files that a run writes besides `config.yaml`."""


class RunFolder:
    """A run's folder, held by this run.

    Process 0 reads and writes; the others wait for it and fail with it.

    Args:
      config: the run's config.
      folder: the run's folder.
      inputs: digests of the files that the run names.
      record: the record of an earlier start, if the run resumes.
      mirror: publishes the folder, if it is the local copy of a folder in a bucket.
    """

    def __init__(
        self,
        config: Run,
        folder: pathlib.Path,
        inputs: dict[str, str],
        record: Any,
        mirror: Mirror | None = None,
    ) -> None:
        self._config, self._folder = config, folder
        self._inputs, self._record = inputs, record
        self._changes = Changes([], [])
        self._mirror = mirror

    @property
    def publish(self) -> Callable[[], None] | None:
        """Uploads the folder and waits; None if the folder is local."""
        return None if self._mirror is None else self._mirror.publish

    def day(self) -> datetime.date:
        """The day of the run's first start, the same on all processes."""
        own = recorded_day((self._record or {}).get("inputs", {})).isoformat()
        every = distributed.all_gather_text("the day that the template writes", own)
        return datetime.date.fromisoformat(every[0])

    def check_files(self) -> None:
        """Compares configuration and files with those of the run's first start.

        Raises:
          ValueError: something differs, unless `run.allow_changes`; the message names each
            difference.
        """
        if self._record is not None:
            old = self._record.get("inputs", {})
            values = self._record["config"]
            self._settle(config_changes(self._config, values, self._inputs, old))

    def check_task(self, task: Task) -> None:
        """Like `check_files`, for inputs that are known once data and tokenizer are read."""
        self._inputs = self._inputs | dict(task.inputs)
        if self._record is None:
            return
        old = self._record.get("inputs", {})
        length = length_change(self._config, self._record.get("total"), task.total)
        known = input_changes(task.inputs, old)
        self._settle(Changes([*known, *length.binding], length.free))

    def make_room(self) -> None:
        """Removes an earlier run's files, if they are to be replaced."""
        with distributed.fail_together("replacing what is in the run's folder"):
            if distributed.is_main() and self._config.run.overwrite:
                _remove_outputs(self._folder)

    def begin(self, task: Task, done: int) -> None:
        """Prints where the run starts, and records its configuration and inputs."""
        if not distributed.is_main():
            return
        every = [*self._changes.binding, *self._changes.free]
        if done:
            every += environment_changes(self._folder)
            place = below(self._config.run.folder, CHECKPOINTS, str(done))
            print(f"resuming after step {done} of {task.total}, from {place}", flush=True)
        elif self._config.run.resume:
            print(
                f"{self._folder / CHECKPOINTS}: no checkpoint yet; starting at step 0", flush=True
            )
        for change in every:
            print(f"  changed: {change}", flush=True)
        day = self._inputs.get(DAY, "")
        if done and day != datetime.date.today().isoformat() and day:
            print(
                f"  the chat template goes on writing {day}, the day of the first start", flush=True
            )
        changes = {change.name: [change.old, change.new] for change in every}
        write_record(self._folder, self._config, self._inputs, task.total, done, changes)
        if self._mirror is not None:
            self._mirror.start()

    def _settle(self, changes: Changes) -> None:
        self._changes.binding.extend(changes.binding)
        self._changes.free.extend(changes.free)
        if changes.binding and not self._config.run.allow_changes:
            raise ValueError(
                f"run.folder={str(self._folder)!r} was begun with something else:\n"
                + "".join(f"  {change}\n" for change in changes.binding)
                + "restore it, go on in spite of it with --allow-changes (run.allow_changes=true), "
                "or choose another folder"
            )


@contextlib.contextmanager
def open_folder(config: Run) -> Iterator[RunFolder]:
    """Takes a run's folder, if it is free and the run may resume from its contents.

    Raises:
      ValueError: another process has the folder; the run would replace files in it; or on resume,
        it has no checkpoint, or one of a run with other settings.
    """
    folder = local_folder(config.run.folder)
    with contextlib.ExitStack() as stack:
        opened = RunFolder(config, folder, {}, None)
        with distributed.fail_together("opening the run's folder"):
            if distributed.is_main():
                stack.enter_context(FolderLock(folder))
                mirror = _open_mirror(config, stack)
                _check_contents(config, folder)
                record = read_record(folder) if config.run.resume else None
                opened = RunFolder(config, folder, file_inputs(config), record, mirror)
                opened.check_files()
        yield opened


def _open_mirror(config: Run, stack: contextlib.ExitStack) -> Mirror | None:
    """Locks a folder in a bucket and makes its local copy; None if the folder is local."""
    address = config.run.folder
    if not is_address(address):
        return None
    outputs = (*_OUTPUTS, CONFIG)
    for source in source_paths(config):
        if any(is_inside(source, f"{address}/{name}") for name in outputs):
            raise ValueError(
                f"run.folder={address!r}: {source!r} is read from there, and would be replaced; "
                "give another path"
            )
    mirror = stack.enter_context(Mirror(address, outputs))
    mirror.pull(everything=bool(config.run.resume))
    return mirror


def has_checkpoints(folder: pathlib.Path) -> bool:
    """Whether a run's folder has any finished checkpoint, damaged or not."""
    return any(path.name.isdecimal() for path in (folder / CHECKPOINTS).glob("*"))


def _check_contents(config: Run, folder: pathlib.Path) -> None:
    """Raises ValueError if files of a user or of another run would be replaced."""
    run = config.run
    replace = "choose another folder, or replace them with --overwrite (run.overwrite=true)"
    earlier = f"these are of an earlier run, which left no checkpoint to go on from; {replace}"
    if has_checkpoints(folder):
        earlier = f"these are of an earlier run; go on with it (run.resume=true), {replace}"
    check_free(
        folder,
        "run.folder",
        overwrite=run.overwrite or bool(run.resume),
        sources=source_paths(config),
        names=_OUTPUTS,
        remedy=earlier,
    )
    if not run.resume and not run.overwrite and not is_empty(folder / CONFIG):
        raise ValueError(
            f"run.folder={str(folder)!r} holds a {CONFIG} that no run wrote, and a run writes its "
            "own there; give yours another name, or choose another folder"
        )
    if not run.resume or has_checkpoints(folder):
        return
    if run.resume is True:
        raise ValueError(
            f"run.resume=true: {folder / CHECKPOINTS} holds no checkpoint; run.resume=auto starts "
            "where there is none"
        )
    check_free(
        folder,
        "run.folder",
        names=(MODEL,),
        remedy="it is of a run whose checkpoints are gone; choose another folder, or replace it "
        "with --overwrite (run.overwrite=true) in place of run.resume",
    )


def _remove_outputs(folder: pathlib.Path) -> None:
    """Removes a run's outputs; renames a configuration that no run wrote."""
    if not is_ours(folder):
        print(f"{folder / CONFIG}: kept as {set_aside(folder / CONFIG, 'before').name}")
    for name in (*_OUTPUTS, CONFIG):
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
