"""Replays a run's steps in memory, from a checkpoint or the start; never changes its folder.

The replay uses the same task, the loop's own step, and the same batches. With the same versions and
devices it reproduces the run's metrics bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from jaxalign.data.day import keep_day
from jaxalign.run.bad_steps import BadSteps
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.folder import CHECKPOINTS, has_checkpoints
from jaxalign.run.inputs import recorded_day
from jaxalign.run.loop import run_step
from jaxalign.run.past import Past, read_past, without
from jaxalign.run.progress import Progress
from jaxalign.run.record import RECORD
from jaxalign.run.remote import fetch_run
from jaxalign.run.reporter import Reporter, Seen
from jaxalign.run.stopping import Clock, StopRequest
from jaxalign.run.tasks import Built, Task, build_task
from jaxalign.types import TrainState

_OF_THE_PROCESS = ("compiles",)
"""Metrics that belong to the process rather than to the step, like those under `time/`."""


class Difference(NamedTuple):
    """A metric that differs from the recorded one.

    Attributes:
      name: the metric's name.
      recorded: its value in `metrics.jsonl`; None if absent.
      replayed: its value now; None if absent.
    """

    name: str
    recorded: Any
    replayed: Any


class Replayed(NamedTuple):
    """A replayed step.

    Attributes:
      step: its number.
      metrics: its metrics, in the form of `metrics.jsonl`.
      compared: how many metrics were compared.
      differences: metrics that differ; () if all are bitwise equal.
    """

    step: int
    metrics: dict[str, Any]
    compared: int
    differences: tuple[Difference, ...]


class Watcher:
    """Callbacks of `Replay.run` within a step. Subclasses store what they need."""

    def batch(self, batch: Any) -> None:
        """Called with a batch of data before `prepare`; several times if PPO takes more prompts."""

    def update(self, state: TrainState, part: Any) -> None:
        """Called before an update, with the state and the batch after `prepare`."""

    def metrics(self, logged: Mapping[str, Any]) -> None:
        """Called with the metrics of that update."""


@contextlib.contextmanager
def open_replay(
    folder: str | pathlib.Path, step: int | None = None, *, allow_changes: bool = False
) -> Iterator[Replay]:
    """Builds the task of a run as it was at one of its steps.

    Args:
      folder: the run's folder. Nothing in it is changed, so a running run may continue.
      step: the step, from 1; None: the last recorded step.
      allow_changes: replay even if data, models, tokenizer or template have changed.

    Raises:
      ValueError: no run there, no such step, or changed inputs.
    """
    past = read_past(folder, step)
    with contextlib.ExitStack() as stack:
        scratch = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        config: Any = without(past.config, folder=str(scratch), allow_changes=allow_changes)
        cache = getattr(config, "reference_cache", None)
        if cache is not None and not (pathlib.Path(cache) / "fingerprint.json").is_file():
            config = dataclasses.replace(config, reference_cache=str(scratch / "reference"))
        stack.enter_context(config.mesh.use_rules())
        changes = [] if not past.inputs else past.file_changes()
        _settle(past, changes, allow_changes)
        stack.enter_context(keep_day(recorded_day(past.inputs)))
        built = build_task(config)
        stack.callback(built.task.batches.close)
        texts = [
            change
            for change in past.text_changes(built.task.inputs)
            if change.name not in {known.name for known in changes}
        ]
        _settle(past, texts, allow_changes)
        store = None
        if has_checkpoints(past.folder):
            store = Checkpoints(past.folder / CHECKPOINTS, keep=None, read_only=True)
            stack.callback(store.close)
        found = [str(change) for change in (*changes, *texts)]
        replay = Replay(past, config, built, store, scratch, found)
        del built  # it holds the initial state, which a restored state will replace
        yield replay


def checkpoints_of(folder: str | pathlib.Path) -> list[int]:
    """The steps of a run's undamaged checkpoints, ascending; damaged ones are printed."""
    place = fetch_run(os.fspath(folder), "folder")
    if not has_checkpoints(place):
        return []
    store = Checkpoints(place / CHECKPOINTS, keep=None, read_only=True)
    try:
        return store.sound_steps()
    finally:
        store.close()


def _settle(past: Past, changes: list[Any], allow_changes: bool) -> None:
    if changes and not allow_changes:
        raise ValueError(
            f"{past.folder}: the run's inputs have changed since:\n"
            + "".join(f"  {change}\n" for change in changes)
            + "restore them, or continue anyway with --allow-changes"
        )


class Replay:
    """Replays steps of a run; see `open_replay`.

    Attributes:
      past: the run folder's record of the requested step.
      built: the run's task, with models and tokenizer. Its train state may be donated.
      config: the run's config, with another folder.
      notes: reasons why the bits may differ from the recorded ones; [] if none is known.
    """

    def __init__(
        self,
        past: Past,
        config: Any,
        built: Built,
        store: Checkpoints | None,
        scratch: pathlib.Path,
        changes: Iterable[str] = (),
    ):
        self.past, self.config = past, config
        self.notes = [*past.environment_changes(), *changes]
        if not past.inputs:
            self.notes.append(
                f"{RECORD} is missing: nobody can tell whether the inputs are the same"
            )
        self._store, self._scratch = store, scratch
        state = built.task.state
        self._start: TrainState | None = state
        self._shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            state._replace(frozen={}),
        )._replace(frozen=state.frozen)
        # The first step donates the state: the task must not hold on to it.
        self.built = built._replace(task=built.task._replace(state=self._shapes))

    def serves(self, step: int) -> bool:
        """Whether another step had the same options, inputs and environment."""
        mine, other = self.past, read_past(self.past.folder, step)
        if getattr(self.config, "ptx", None) is not None:
            return False  # its stream of texts cannot be rewound
        now = (mine.values, mine.inputs, mine.environment)
        return now == (other.values, other.inputs, other.environment)

    def start_before(self, step: int) -> int:
        """The newest undamaged checkpoint before a step; 0: the initial state.

        Raises:
          ValueError: the options changed in between.
        """
        found = None if self._store is None else self._store.sound_before(step)
        start = 0 if found is None else found
        learned, bits = self.past.changes_between(start, step)
        if learned:
            raise ValueError(
                f"step={step}: {', '.join(learned)} changed between step {start}, where the replay "
                "would begin, and it, and no checkpoint of that moment is left; explain a step "
                "after a later checkpoint, or keep more of them (run.keep)"
            )
        self.notes += [f"{name}: another one between steps {start} and {step}" for name in bits]
        return start

    def run(self, start: int, end: int, watcher: Watcher | None = None) -> list[Replayed]:
        """Runs the steps after `start` up to `end`.

        Args:
          start: a checkpoint's step, or 0; a replay can start from 0 only once.
          end: the last step.
          watcher: called in the last step.

        Raises:
          ValueError: the checkpoint is damaged or does not fit, or the data ends before `end`.
        """
        task = self.built.task
        state, position = self._state_at(start)
        loop: Any = position.get("loop", copy.deepcopy(task.loop))
        bad_steps = BadSteps(self.config.run.bad_steps, loop)
        if start == 0 and task.on_train_start is not None:
            task.on_train_start(state, loop)
        progress = Progress(self.config, task, state, position.get("taken", start))
        reporter = Reporter(
            self._scratch,
            "replay",
            end,
            start,
            end + 1,  # no line on the terminal
            Seen(**position.get("seen", {})),
            bad_steps=bad_steps,
        )
        root, done = jax.random.key(self.config.run.seed), start
        with contextlib.closing(reporter), contextlib.closing(task.batches):
            while done < end:
                done += 1
                task = _watched(task, watcher) if watcher is not None and done == end else task
                key = jax.random.fold_in(root, done - 1)
                stop, clock = StopRequest(), Clock(None, None)
                stepped = run_step(task, key, state, loop, progress, done, stop, clock)
                if stepped is None:
                    raise ValueError(f"the data ends before step {end}; are the files the same?")
                state, record, _ = stepped
                try:
                    reporter.add(record, keep=0)
                except FloatingPointError as error:
                    if done < end:
                        raise
                    print(f"the run ended with this step: {error}")
        steps = range(start + 1, end + 1)
        return [self._compare(*pair) for pair in zip(steps, reporter.history, strict=True)]

    def _state_at(self, start: int) -> tuple[TrainState, dict[str, Any]]:
        initial, self._start = self._start, None
        if start == 0:
            if initial is None:
                raise ValueError("start=0: a replay begins at the initial state only once")
            return initial, {}
        assert self._store is not None
        del initial
        state, position = self._store.restore(self._shapes, start)
        if self.past.owner is not None:
            self._store.check_again(start)
        batches = self.built.task.batches
        batches.set_state(position["batches"] | self._known_checksum())
        return state, position

    def _known_checksum(self) -> dict[str, int]:
        """The current data's checksum, if changes are allowed."""
        return (
            {"checksum": self.built.task.batches.checksum} if self.config.run.allow_changes else {}
        )

    def _compare(self, step: int, metrics: Mapping[str, Any]) -> Replayed:
        """Compares with the recorded metrics, bit for bit."""
        found = {n: v if math.isfinite(v) else str(v) for n, v in metrics.items()}
        recorded = self.past.metrics.get(step, {})
        now, then = _of_the_step(found), _of_the_step(recorded)
        # Compare as text, which distinguishes 0 from −0 and round-trips every float64.
        differences = tuple(
            Difference(name, value, now.get(name))
            for name, value in then.items()
            if repr(value) != repr(now.get(name))
        )
        return Replayed(step, found, len(then), differences)


def _of_the_step(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in metrics.items()
        if not name.startswith("time/") and name not in _OF_THE_PROCESS
    }


def _watched(task: Task, watcher: Watcher) -> Task:
    """The task, with a watcher called at its batches and updates."""
    prepare_updates: Callable[..., Any] = task.prepare_updates
    step: Any = _WatchedStep(task.step, watcher)

    def watched(key: Any, state: Any, batch: Any, loop: Any, more: Iterator[Any]) -> Any:
        watcher.batch(batch)
        return prepare_updates(key, state, batch, loop, _seen(more, watcher.batch))

    return task._replace(prepare_updates=watched, step=step)


def _seen(batches: Iterator[Any], see: Callable[[Any], None]) -> Iterator[Any]:
    for batch in batches:
        see(batch)
        yield batch


class _WatchedStep:
    """A compiled step that passes its arguments and metrics to the watcher."""

    def __init__(self, step: Any, watcher: Watcher):
        self._step, self._watcher = step, watcher

    def __call__(self, state: TrainState, part: Any) -> tuple[TrainState, dict[str, Any]]:
        self._watcher.update(state, part)
        state, logged = self._step(state, part)
        self._watcher.metrics(logged)
        return state, logged

    @property
    def compiles(self) -> int:
        return self._step.compiles
