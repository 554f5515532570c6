"""Checkpoints with Orbax: train state and loop position together, so that a run resumes exactly."""

from __future__ import annotations

import contextlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign.hf import checksums
from jaxalign.parallel import distributed
from jaxalign.run.saved_averages import wanted_averages, with_averages
from jaxalign.types import Params, TrainState

# What Orbax may write again after the checksums, and what holds nothing that a run reads.
_NOT_SUMMED = ("_CHECKPOINT_METADATA", "commit_success.txt")


class Checkpoints:
    """The checkpoints of one run.

    Each holds `checksums.json`, with size and checksum of all its files. Orbax gives a checkpoint
    its name only after that file is written, so one without its checksums is not complete, or is
    from a version that wrote none.

    Args:
      folder: where they live, one sub-folder a step.
      keep: how many of the newest are kept; None keeps all.
      read_only: nothing in the folder is made, moved or removed, and nothing can be saved.
    """

    def __init__(
        self, folder: str | pathlib.Path, keep: int | None = 2, *, read_only: bool = False
    ):
        self._folder = pathlib.Path(folder).absolute()
        self._read_only = read_only
        self._saving: int | None = None
        self._checked: dict[int, str] = {}  # step → what is wrong with it
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else keep,
            create=not read_only,
            read_only=read_only,
            save_interval_steps=0 if read_only else 1,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()}
        with _without_warnings() if read_only else contextlib.nullcontext():
            self._manager = ocp.CheckpointManager(
                self._folder, options=options, item_handlers=handlers
            )

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, damaged or not; or None."""
        return self._manager.latest_step()

    def sound_steps(self) -> list[int]:
        """The steps of all undamaged checkpoints, ascending; the damaged ones are printed."""
        return [step for step in sorted(self._manager.all_steps()) if self._is_sound(step)]

    def sound_before(self, step: int) -> int | None:
        """The newest undamaged checkpoint of an earlier step; newer damaged ones are printed."""
        earlier = sorted((s for s in self._manager.all_steps() if s < step), reverse=True)
        return next((s for s in earlier if self._is_sound(s)), None)

    def check_again(self, step: int) -> None:
        """Reads a checkpoint's files once more, where another process may have removed some.

        Raises:
          ValueError: it is no longer complete.
        """
        self._checked.pop(step, None)
        if damage := self._damage(step):
            raise ValueError(
                f"checkpoint {self._folder}/{step} changed while it was read: {damage}; try again"
            )

    def save(self, step: int, state: TrainState, loop: dict[str, Any]) -> None:
        """Saves in the background; the arrays are copied before this returns.

        Args:
          step: the name of the checkpoint.
          state: parameters and optimizer; `frozen` is not saved, it never changes.
          loop: JSON-able position of the loop: data state, KL coefficient, seed.
        """
        self._manager.wait_until_finished()
        self._saving = step
        self._checked.pop(step, None)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_saved(state)), loop=ocp.args.JsonSave(loop)
            ),
        )

    def restore(
        self, state: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Loads a checkpoint into the shapes and layout of `state`.

        Args:
          state: of the same structure; its `frozen` is kept as it is.
          step: which checkpoint; the newest sound one by default. Damaged ones that are newer are
            named on the screen and moved out of the way, to `<step>.damaged` (not read-only).

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
        except Exception as error:  # whatever Orbax and TensorStore raise, pages long at times
            raise ValueError(self._cannot_read(step, error)) from error
        loaded = restored["state"]
        state = TrainState(loaded["step"], loaded["params"], state.frozen, loaded["opt_state"])
        return state, restored["loop"]

    def param_shapes(self, step: int | None = None) -> tuple[int, Params]:
        """The structure, shapes and dtypes of a checkpoint's parameters, without reading them.

        Args:
          step: which checkpoint; the newest sound one by default.

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
          step: which checkpoint.
          wanted: nested dict of `jax.ShapeDtypeStruct` with their layouts, a part of the tree that
            `param_shapes` gives.
          averaged: their averages over the updates instead, where the optimizer has kept some.

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
        there = sorted(self._manager.all_steps())
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
        """The same, read by process 0 for all."""
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
        """Called by Orbax in its own thread before a written checkpoint gets its name."""
        if distributed.is_main() and self._saving is not None:
            for place in self._folder.glob(f"{self._saving}.*tmp*"):
                checksums.write(place, _NOT_SUMMED)

    def _metadata(self, step: int) -> Any:
        try:
            return self._manager.item_metadata(step)["state"]
        except Exception as error:  # whatever Orbax and TensorStore raise
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
        self._manager.wait_until_finished()
        self._manager.close()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns that a folder which was opened for reading is one for reading."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; named tuples, which Orbax gives back as dicts, count as dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }
