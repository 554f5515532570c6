"""Checkpoints with Orbax: train state and loop position together, so that a run resumes exactly."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxalign.types import Params, TrainState


class Checkpoints:
    """The checkpoints of one run.

    Args:
      folder: where they live, one sub-folder a step.
      keep: how many of the newest are kept; None keeps all.
    """

    def __init__(self, folder: str | pathlib.Path, keep: int | None = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._folder = pathlib.Path(folder).absolute()
        handlers = {"state": ocp.StandardCheckpointHandler(), "loop": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    @property
    def latest(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, loop: dict[str, Any]) -> None:
        """Saves in the background; the arrays are copied before this returns.

        Args:
          step: the name of the checkpoint.
          state: parameters and optimizer; `frozen` is not saved, it never changes.
          loop: JSON-able position of the loop: data state, KL coefficient, seed.
        """
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
          step: which checkpoint; the newest by default.

        Raises:
          ValueError: there is none, or it does not fit the state.
        """
        step = self._find(step, "start without resume=true")
        self._check_fits(step, _shapes(_saved(state)))
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _saved(state)
        )
        wanted = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), loop=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=wanted)
        except (ValueError, KeyError, TypeError) as error:
            # Of the same shapes and another structure, as Adam's moments have it by their type.
            raise ValueError(
                f"checkpoint {self._folder}/{step} does not fit this run's model or optimizer, "
                "though their shapes are the same; resume with the config it was made with "
                "(optimizer.moments, optimizer.offload, model.lora), or start in another folder"
            ) from error
        loaded = restored["state"]
        state = TrainState(loaded["step"], loaded["params"], state.frozen, loaded["opt_state"])
        return state, restored["loop"]

    def param_shapes(self, step: int | None = None) -> tuple[int, Params]:
        """What a checkpoint's parameters are, without reading them.

        Args:
          step: which checkpoint; the newest by default.

        Returns:
          (its step, nested dict of `jax.ShapeDtypeStruct`).

        Raises:
          ValueError: there is none.
        """
        step = self._find(step, "train with run.checkpoint=true first")
        tree = self._manager.item_metadata(step)["state"]["params"]
        return step, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(tree))

    def restore_params(self, step: int, wanted: Params) -> tuple[Params, dict[str, Any]]:
        """Loads some of a checkpoint's parameters; optimizer and all others are not read.

        Args:
          step: which checkpoint.
          wanted: nested dict of `jax.ShapeDtypeStruct` with their layouts, a part of the tree that
            `param_shapes` gives.

        Returns:
          (the parameters, position of the loop).
        """
        item = {"params": wanted}
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
        return state["params"], loop["loop"]

    def _find(self, step: int | None, remedy: str) -> int:
        step = self.latest if step is None else step
        if step is None:
            raise ValueError(f"no checkpoint in {self._folder}; {remedy}")
        there = sorted(self._manager.all_steps())
        if step not in there:
            raise ValueError(
                f"no checkpoint {step} in {self._folder}; there are: "
                f"{', '.join(map(str, there)) if there else 'none'}"
            )
        return step

    def _check_fits(self, step: int, wanted: dict[str, tuple[int, ...]]) -> None:
        saved = _shapes(self._manager.item_metadata(step)["state"])
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


def _saved(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes by path; named tuples, which Orbax gives back as dicts, count as dicts."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }
