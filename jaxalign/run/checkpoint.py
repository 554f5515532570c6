"""Checkpoints with Orbax: train state and loop position together, so that a run resumes exactly."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign.hf import checksums
from jaxalign.parallel import distributed
from jaxalign.run.quiet import quiet_failures, without_warnings
from jaxalign.run.saved_averages import wanted_averages, with_averages
from jaxalign.run.storage import MOVED, Place, failure_of, retry, say, what_is_safe
from jaxalign.types import Params, TrainState

# Files that Orbax may rewrite after the checksums, and files that a run never reads.
_NOT_SUMMED = ("_CHECKPOINT_METADATA", "commit_success.txt")
_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a checkpoint that is being written
_SLOW_SECONDS = 30.0


class Checkpoints:
    """The checkpoints of one run.

    Each holds `checksums.json`, with size and checksum of all its files. Orbax gives a checkpoint
    its name only after that file is written, so a checkpoint without checksums is incomplete, or
    from a version that wrote none.

    Args:
      folder: their folder, with one sub-folder per step.
      keep: how many of the newest to keep; None keeps all.
      read_only: never create, move or remove anything in the folder; saving is an error.
      publish: called when a pending save has finished, before the next one begins.

    Attributes:
      best: the step of a checkpoint that is always kept, or None.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        keep: int | None = 2,
        *,
        read_only: bool = False,
        publish: Callable[[], None] | None = None,
    ):
        self._folder = pathlib.Path(folder).absolute()
        self._read_only = read_only
        self.best: int | None = None
        self._keep, self._publish = keep, publish
        self._saving: int | None = None
        self._failed = False
        self._checked: dict[int, str] = {}  # step → what is wrong with it
        self._quiet = quiet_failures()
        self._quiet.__enter__()
        self._manager = self._make_manager()
        self._place = Place(self._folder)

    def _make_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None,
            preservation_policy=(
                None if self._keep is None or self._read_only else _NewestAndBest(self, self._keep)
            ),
            create=not self._read_only,
            read_only=self._read_only,
            save_interval_steps=0 if self._read_only else 1,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()}
        with without_warnings() if self._read_only else contextlib.nullcontext():
            return ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, damaged or not; or None."""
        return self._manager.latest_step()

    def sound_steps(self) -> list[int]:
        """The steps of all undamaged checkpoints, ascending; damaged ones are printed."""
        return [step for step in self.steps if self._is_sound(step)]

    def sound_before(self, step: int) -> int | None:
        """The newest undamaged checkpoint of an earlier step; newer damaged ones are printed."""
        earlier = [s for s in reversed(self.steps) if s < step]
        return next((s for s in earlier if self._is_sound(s)), None)

    def check_again(self, step: int) -> None:
        """Checks a checkpoint's files again, because another process may have removed some.

        Raises:
          ValueError: it is no longer complete.
        """
        self._checked.pop(step, None)
        if damage := self._damage(step):
            raise ValueError(
                f"checkpoint {self._folder}/{step} changed while it was read: {damage}; try again"
            )

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, damaged or not."""
        return sorted(self._manager.all_steps())

    def remove_unfinished(self) -> None:
        """Removes the remains of killed saves; only the folder's owner may call it."""
        for place in self._folder.glob(f"*{_UNFINISHED}*"):
            shutil.rmtree(place, ignore_errors=True)

    def save(self, step: int, state: TrainState, loop: dict[str, Any]) -> None:
        """Saves in the background; the arrays are copied before this returns.

        A run in one process retries if storage fails (`run.storage.retry`). If the previous save
        failed in the background, this save replaces it and blocks.

        Args:
          step: the name of the checkpoint.
          state: parameters and optimizer; `frozen` never changes and is not saved.
          loop: JSON-able position of the loop: data state, KL coefficient, seed.

        Raises:
          StorageError: storage still fails after the last try; older checkpoints are intact.
        """
        failed = self._wait()
        if failed:
            say(
                f"checkpoint {self._folder}/{self._saving} could not be written: {failed}; saving "
                f"step {step} in its place"
            )
        self._save(step, state, loop, wait=bool(failed))

    def finish(self, step: int, state: TrainState, loop: dict[str, Any]) -> None:
        """Waits until checkpoint `step` is on disk, and saves it again if saving failed.

        Args:
          step, state, loop: as in the call of `save` for this step.

        Raises:
          StorageError: as `save`.
        """
        failed = self._wait()
        if failed:
            say(f"checkpoint {self._folder}/{step} could not be written: {failed}")
            self._save(step, state, loop, wait=True)

    def _wait(self) -> str:
        """Waits for the pending save; returns the storage error, or ""."""
        began = time.monotonic()
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            failure = failure_of(error)
            if failure is None or jax.process_count() > 1:
                raise
            self._reopen()
            return os.strerror(failure)
        if self._moved():
            self._clear()
            return os.strerror(errno.ENOENT)
        waited = time.monotonic() - began
        if waited > _SLOW_SECONDS and distributed.is_main():
            say(
                f"waited {waited:.0f} s for checkpoint {self._folder}/{self._saving}: storage is "
                "slow; save less often, or to another disk"
            )
        if self._publish is not None:
            self._publish()
        return ""

    def _save(self, step: int, state: TrainState, loop: dict[str, Any], *, wait: bool) -> None:
        self._saving = step
        self._checked.pop(step, None)
        again = False

        def attempt() -> None:
            nonlocal again
            if again:
                self._reopen()
            again = True
            self._check_place()
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_saved(state)), loop=ocp.args.JsonSave(loop)
                ),
            )
            if wait:
                self._manager.wait_until_finished()
                self._check_place()

        def safe() -> str:
            self._clear()
            return MOVED if self._moved() else what_is_safe(self._folder)

        if jax.process_count() > 1:  # a process must not retry without the others
            attempt()
            return
        retry(attempt, f"checkpoint {self._folder}/{step}", self._folder, safe=safe)

    def _check_place(self) -> None:
        if self._moved():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._folder)

    def _moved(self) -> bool:
        """Whether the folder is gone, or only what pending writes have created in its place."""
        if self._place.is_there():
            return False
        ours = {self._folder, self._folder / str(self._saving)}
        found = {*self._folder.parent.glob("*"), *self._folder.glob("*")}
        return all(path in ours or _UNFINISHED in path.name for path in found)

    def _reopen(self) -> None:
        """Replaces the manager, which never forgets a failure, by a new one."""
        self._clear()
        if not self._moved():
            self._manager = self._make_manager()

    def _clear(self) -> None:
        """Removes the files of a failed save, which take up space."""
        self._failed = True
        with contextlib.suppress(Exception):
            self._manager.close()
        self.remove_unfinished()
        self._remove_strays()

    def _remove_strays(self) -> None:
        """Removes what a pending write has created in the place of a folder that was moved."""
        if self._saving is not None and self._moved():
            shutil.rmtree(self._folder / str(self._saving), ignore_errors=True)
            with contextlib.suppress(OSError):  # gone, or it holds something else
                self._folder.rmdir()
                self._folder.parent.rmdir()

    def restore(
        self, state: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Loads a checkpoint into the shapes and layout of `state`.

        Args:
          state: a state of the same structure; its `frozen` is kept.
          step: the checkpoint's step; by default the newest undamaged one. Newer, damaged
            checkpoints are printed and renamed to `<step>.damaged` (unless read-only).

        Raises:
          ValueError: there is none, it is damaged, or it does not fit the state.
        """
        step = self._find(step, "start without resume=true")
        if not self._read_only:
            self._set_aside_above(step)
        self._check_fits(step, _shapes(_saved(state)))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state)
        )
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), loop=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # any error of Orbax and TensorStore, which can be pages long
            raise ValueError(self._cannot_read(step, error)) from error
        loaded = restored["state"]
        state = TrainState(loaded["step"], loaded["params"], state.frozen, loaded["opt_state"])
        return state, restored["loop"]

    def param_shapes(self, step: int | None = None) -> tuple[int, Params]:
        """The structure, shapes and dtypes of a checkpoint's parameters, without reading them.

        Args:
          step: the checkpoint's step; by default the newest undamaged one.

        Returns:
          (its step, nested dict of `jax.ShapeDtypeStruct`).

        Raises:
          ValueError: there is none, or it is damaged.
        """
        step = self._find(step, "train with run.checkpoint=true first")
        tree = self._metadata(step)["params"]
        return step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(tree))

    def restore_params(
        self, step: int, wanted: Params, *, averaged: bool = False
    ) -> tuple[Params, dict[str, Any]]:
        """Loads some of a checkpoint's parameters; the rest of the state is not read.

        Args:
          step: the checkpoint's step.
          wanted: nested dict of `jax.ShapeDtypeStruct` with shardings, part of the tree of
            `param_shapes`.
          averaged: load their averages over the updates instead, if the optimizer has kept them.

        Returns:
          (the parameters, position of the loop).
        """
        item = {"params": wanted}
        averages = wanted_averages(self._metadata(step)["opt_state"], wanted) if averaged else {}
        if averages:
            item |= {"opt_state": averages}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = reader.restore(
                self._folder / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
        loop = self._manager.restore(step, args=ocp.args.Composite(loop=ocp.args.JsonRestore()))
        return with_averages(state["params"], state.get("opt_state")), loop["loop"]

    def _find(self, step: int | None, remedy: str) -> int:
        """The requested step, or the newest intact one; skipped ones are printed."""
        there = self.steps
        if step is not None and step not in there:
            raise ValueError(
                f"no checkpoint {step} in {self._folder}; there are: "
                f"{', '.join(map(str, there)) if there else 'none'}"
            )
        if step is not None:
            if damage := self._damage(step):
                sound = next((s for s in reversed(there) if not self._damage(s)), None)
                instead = (
                    "there is no sound one" if sound is None else f"checkpoint {sound} is sound"
                )
                raise ValueError(
                    f"checkpoint {self._folder}/{step} is damaged: {damage}; {instead}"
                )
            return step
        if not there:
            raise ValueError(f"no checkpoint in {self._folder}; {remedy}")
        for found in reversed(there):
            if self._is_sound(found):
                return found
        raise ValueError(
            f"none of the {len(there)} checkpoints in {self._folder} is sound; what is wrong with "
            f"each is printed above. {remedy[0].upper()}{remedy[1:]}"
        )

    def _is_sound(self, step: int) -> bool:
        """Whether a checkpoint is undamaged; prints what is wrong with it."""
        damage = self._damage(step)
        if damage and distributed.is_main():
            print(f"checkpoint {self._folder}/{step} is passed over: {damage}", flush=True)
        return not damage

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint, "" if nothing is; its files are read once."""
        if step not in self._checked:
            self._checked[step] = self._read_damage(step)
        return self._checked[step]

    def _read_damage(self, step: int) -> str:
        """The same, read by process 0 for all processes."""
        text = ""
        if distributed.is_main():
            place = self._folder / str(step)
            missing = [name for name in ("state", "loop") if not (place / name).is_dir()]
            found = checksums.check(place)
            if missing:
                text = f"{' and '.join(missing)} missing"
            elif found is None:
                print(f"checkpoint {place} has no {checksums.NAME}: taken unchecked", flush=True)
            elif found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                text = f"{found[0]}{more}"
        return distributed.all_gather_text("checking a checkpoint", text)[0]

    def _set_aside_above(self, step: int) -> None:
        """Renames damaged checkpoints newer than `step`: the run will reach their steps again."""
        newer = [other for other in self._manager.all_steps() if other > step]
        damaged = [other for other in newer if self._damage(other)]
        with distributed.fail_together("setting damaged checkpoints aside"):
            for other in damaged if distributed.is_main() else ():
                aside = self._folder / f"{other}.damaged"
                count = 1
                while aside.exists():
                    count += 1
                    aside = self._folder / f"{other}.damaged-{count}"
                (self._folder / str(other)).rename(aside)
        if damaged:
            self._manager.reload()

    def _write_checksums(self) -> None:
        """Orbax calls this in its own thread before a written checkpoint gets its name."""
        if distributed.is_main() and self._saving is not None:
            for place in self._folder.glob(f"{self._saving}.*tmp*"):
                checksums.write(place, _NOT_SUMMED)

    def _metadata(self, step: int) -> Any:
        try:
            return self._manager.item_metadata(step)["state"]
        except Exception as error:  # any error of Orbax and TensorStore
            raise ValueError(self._cannot_read(step, error)) from error

    def _cannot_read(self, step: int, error: Exception) -> str:
        first = str(error).strip().splitlines()
        reason = first[0][:200] if first else "no reason given"
        return (
            f"checkpoint {self._folder}/{step} cannot be read: {type(error).__name__}: {reason}; "
            "remove or rename its folder to go on from the one before"
        )

    def _check_fits(self, step: int, wanted: dict[str, tuple[int, ...]]) -> None:
        saved = _shapes(self._metadata(step))
        wrong = [k for k in sorted(saved | wanted) if saved.get(k) != wanted.get(k)]
        if wrong:
            name = wrong[0]
            raise ValueError(
                f"checkpoint {self._folder}/{step} does not fit this run's model or optimizer: "
                f"{name} is {saved.get(name, 'missing')} in the checkpoint and "
                f"{wanted.get(name, 'missing')} in the run ({len(wrong)} differ); "
                "resume with the config it was made with, or start in another folder"
            )

    def close(self) -> None:
        """Waits until all saves are on disk."""
        try:
            self._manager.wait_until_finished()
            self._manager.close()
        finally:
            self._remove_strays()
            if self._failed:
                # Pending writes may recreate its folder, and fail until the process ends.
                self.remove_unfinished()
            else:
                self._quiet.__exit__(None, None, None)


class _NewestAndBest(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps a run's newest checkpoints and its best one."""

    def __init__(self, store: Checkpoints, keep: int):
        self._store, self._keep = store, keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [info.step for info in checkpoints]
        newest = sorted(steps)[-self._keep :]
        return [step in newest or step == self._store.best for step in steps]


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; named tuples are treated as dicts, because Orbax restores them as dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }
