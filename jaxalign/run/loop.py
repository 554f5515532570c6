"""The training loop, for all algorithms: set up, resume, loop, evaluate, save, export."""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxalign.data import filled
from jaxalign.data.day import keep_day
from jaxalign.parallel import distributed
from jaxalign.run.bad_steps import BadSteps, check_weights, origins_of
from jaxalign.run.best import BestStep
from jaxalign.run.changes import flat_values
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import RunConfig
from jaxalign.run.config.yaml import to_values
from jaxalign.run.early_stopping import EarlyStopper
from jaxalign.run.folder import CHECKPOINTS, MODEL, has_checkpoints, open_folder
from jaxalign.run.progress import Progress
from jaxalign.run.record import check_hosts, write_data_report
from jaxalign.run.remote import check_processes, local_folder, named_by_address
from jaxalign.run.reporter import Reporter, Seen, StepRecord, pop_work
from jaxalign.run.running import Running
from jaxalign.run.stopping import Clock, StopRequest, Wishes, stop_on_signals
from jaxalign.run.storage import retry, what_is_safe
from jaxalign.run.tasks import Task, make_task
from jaxalign.run.tasks.loader import KeepingLoader
from jaxalign.run.tasks.task import Loop
from jaxalign.run.trackers.hub import Trackers, open_trackers
from jaxalign.run.trackers.table import usable
from jaxalign.types import TrainState


class Result(NamedTuple):
    """The result of a run.

    Attributes:
      folder: the run's folder; for a folder in a bucket, its local copy.
      model: folder of the exported weights, or None.
      before: held-out metrics before the first update ({} without held-out data, or if resumed).
      after: held-out metrics after the last update.
      history: the metrics of every step of this process, oldest first.
      seconds: wall time, including set-up and compilation.
      signal: the signal that asked the run to stop after it had finished, or None.
      best: the step of the best checkpoint by `run.keep_best`, or None.
    """

    folder: pathlib.Path
    model: pathlib.Path | None
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]]
    seconds: float
    signal: str | None = None
    best: int | None = None


class Hooks(NamedTuple):
    """Customisation of a run by a caller of `train`.

    Attributes:
      loader: passes models in memory instead of reading them, and keeps the run's model.
      adapt: (task) → the task to run, for example with another end.
      make_bar: (title, steps, steps done) → the progress bar, with the tqdm methods that `Reporter`
        calls; tqdm's own by default.
      evaluate_first: whether to evaluate held-out data before the first step.
    """

    loader: KeepingLoader | None = None
    adapt: Callable[[Task], Task] | None = None
    make_bar: Callable[[str, int, int], Any] | None = None
    evaluate_first: bool = True


def train(
    config: Any,
    title: str | None = None,
    began: float | None = None,
    hooks: Hooks | None = None,
) -> Result:
    """Runs one configuration to its end; on several hosts, within `distributed.session()`.

    If it is killed at any point and restarted with `run.resume=true`, it resumes from the newest
    checkpoint and reproduces the metrics of an uninterrupted run on the same mesh bit for bit
    (except those under `time/`).

    Args:
      config: from `load_config`.
      title: shown beside the progress bar.
      began: `time.monotonic()` when the command began, from which `run.time_limit` counts; None:
        now.
      hooks: for a caller that runs several stages.

    Raises:
      ValueError: a wrong configuration or input, a folder in use, one that holds another run, or a
        resume under other settings.
      FloatingPointError: the loss is no longer a number.
      jaxalign.parallel.distributed.Preempted: a signal or the time limit; a checkpoint was saved.
      jaxalign.run.storage.StorageError: the folder cannot be written to for half a minute; the last
        checkpoint is intact.
    """
    clock = Clock(config.run.save_minutes, config.run.time_limit, began)
    # However the run ends, pending saves are finished and files closed.
    with contextlib.ExitStack() as stack, config.mesh.use_rules():
        stop = stack.enter_context(stop_on_signals())
        with named_by_address(config.run.folder):
            return _train(config, title, hooks or Hooks(), stack, stop, clock)


def _train(
    config: Any,
    title: str | None,
    hooks: Hooks,
    stack: contextlib.ExitStack,
    stop: StopRequest,
    clock: Clock,
) -> Result:
    began = time.perf_counter()
    run: RunConfig = config.run
    folder = local_folder(run.folder)
    check_processes(run.folder)
    check_hosts(folder, config)
    with distributed.fail_together("looking for the trackers"):
        trackers_used = usable(run.trackers, optional=run.trackers_optional)
    opened = stack.enter_context(open_folder(config))
    stack.enter_context(keep_day(opened.day()))

    # ---------------------------------------------------------------- models, data, step
    task = make_task(config) if hooks.loader is None else make_task(config, hooks.loader)
    task = task if hooks.adapt is None else hooks.adapt(task)
    opened.check_task(task)
    opened.make_room()

    # ---------------------------------------------------------------- resume
    state, position = task.state, {}
    store = _open_checkpoints(run, folder, opened.publish)
    if store is not None:
        stack.push(functools.partial(_close, store))
        if store.latest is not None:
            state, position = _restore(store, task, run)
    loop, done = position.get("loop", task.loop), position.get("done", 0)
    # The first step donates the task's initial state: use `state` from here on.
    task = task._replace(state=state)

    # ---------------------------------------------------------------- before the first step
    opened.begin(task, done)
    write_data_report(folder, task.data_report())
    stack.callback(task.batches.close)
    if task.on_train_start is not None and done == 0:
        task.on_train_start(state, loop)  # it may read the first batches, so `progress` comes later
    running = _start(config, title, hooks, stack, trackers_used, task, store, loop, done, position)
    reporter, best = running.reporter, running.best
    early, progress = running.early, running.progress
    if done == 0 and hooks.evaluate_first:
        running.evaluate(state, 0)
    before = running.figures
    best.is_better(before)  # a misspelt metric is an error now, not hours later
    root = jax.random.key(run.seed)
    _stop_before_start(stop, done)
    reporter.start_clock()
    clock.start_step()

    # ---------------------------------------------------------------- the loop
    while done < task.total and not early.ends:
        key = jax.random.fold_in(root, done)
        stepped = run_step(task, key, state, loop, progress, done + 1, stop, clock)
        if stepped is None:
            break
        state, record, own = stepped
        done += 1
        # Another host's requests arrive one step later, with this step's sums.
        wishes = own if jax.process_count() == 1 else reporter.wishes
        stops = distributed.preempted(done) or wishes.stop
        ended = None if task.end_with is None else task.end_with(state, done)
        last = done == task.total or ended is not None
        evaluates = progress.falls_due(run.eval_every, done) and not last
        saves = stops or wishes.save or progress.falls_due(run.save_every, done)
        # A step's metrics are read while the next step runs, so that no device waits for this loop.
        # But no state is saved or evaluated before its own metrics are known to be finite.
        settle = evaluates or saves or last or not task.async_metrics
        reporter.add(record, keep=0 if settle else 1)
        state = state if ended is None else ended
        if evaluates:
            running.evaluate(state, done)
            saves = saves or best.is_better(running.figures)
        if saves and running.save(state, done, evaluated=evaluates):
            clock.saved()
            reporter.wishes = reporter.wishes._replace(save=False)
        if stops:
            running.finish(state, done)
            raise distributed.Preempted(_how_to_go_on(done, task.total, stop, run, store))
        if ended is not None:
            break
        if evaluates or saves:
            reporter.start_clock()
            clock.start_step()

    # ---------------------------------------------------------------- after the last step
    reporter.settle()
    reporter.close_bar()
    if early.ends and done < task.total:
        print(f"step {done} of {task.total}: {early.message()}")
    running.end(state, done)
    exported = _export_last(task, state, done, folder, hooks) if run.export else None
    if (line := best.message(run.folder)) is not None and distributed.is_main():
        print(line, flush=True)
    seconds, figures = time.perf_counter() - began, running.figures
    return Result(
        folder, exported, before, figures, reporter.history, seconds, stop.signal, best.step
    )


def _start(
    config: Any,
    title: str | None,
    hooks: Hooks,
    stack: contextlib.ExitStack,
    trackers_used: Sequence[str],
    task: Task,
    store: Checkpoints | None,
    loop: Loop,
    done: int,
    position: dict[str, Any],
) -> Running:
    """Opens what reports on the run; `position` is the one to go on from, or {}."""
    run: RunConfig = config.run
    folder = local_folder(run.folder)
    name = title or type(config).__name__.removesuffix("Run").lower()
    seen, bad_steps = Seen(**position.get("seen", {})), BadSteps(run.bad_steps, loop)
    trackers = open_trackers(
        trackers_used, folder=folder, project=run.tracker_project,
        config=flat_values(to_values(config)), done=done, optional=run.trackers_optional,
    )  # fmt: skip
    stack.push(functools.partial(_close_trackers, trackers))
    reporter = Reporter(
        folder, name, task.total, done, run.log_every, seen,
        bad_steps=bad_steps, make_bar=hooks.make_bar, trackers=trackers,
    )  # fmt: skip
    stack.callback(reporter.close)
    return Running(
        task=task,
        loop=loop,
        folder=folder,
        store=store,
        reporter=reporter,
        best=_best_so_far(run, store, reporter),
        bad_steps=bad_steps,
        early=EarlyStopper(run.early_stopping, position.get("early")),
        progress=Progress(config, task, task.state, position.get("taken", done)),
        figures={},
        saved_at=done,
    )


def run_step(
    task: Task,
    key: jax.Array,
    state: TrainState,
    loop: Loop,
    progress: Progress,
    number: int,
    stop: StopRequest,
    clock: Clock,
) -> tuple[TrainState, StepRecord, Wishes] | None:
    """Runs one batch: the algorithm prepares it, then each part is an update.

    It returns before the devices are done: the state, the record, and this host's requests. None if
    no batch is left.
    """
    asked_at = time.perf_counter()
    batch = next(progress.batches, None)
    if batch is None:
        print(f"the data ended after step {number - 1} of {task.total}, and the run with it")
        return None
    waited = time.perf_counter() - asked_at
    parts, metrics = task.prepare_updates(key, state, batch, loop, progress.batches)
    timing = {name: metrics.pop(name) for name in list(metrics) if name.startswith("time/")}
    wishes = clock.after_step()
    wishes = wishes._replace(stop=wishes.stop or stop.signal is not None)
    counts = distributed.all_reduce_sum(
        [*filled(batch), progress.batches.pop_samples(), *map(int, wishes), *pop_work(timing)]
    )
    updates: list[dict[str, Any]] = []
    for part in parts:
        state, logged = task.step(state, part)
        updates.append(logged)
        if task.early_stop is not None and task.early_stop(logged):
            break
    if task.early_stop is not None:
        metrics = metrics | {"updates": len(updates)}
    timing |= {"time/data": waited}
    metrics = metrics | progress.after_updates(len(updates))
    origins = functools.partial(origins_of, task, batch, number)
    record = StepRecord(number, updates, metrics, timing, counts, task.step.compiles, origins)
    return state, record, wishes


def _stop_before_start(stop: StopRequest, done: int) -> None:
    """Ends a run that received a stop signal during set-up."""
    if stop.signal is not None and jax.process_count() == 1:
        raise distributed.Preempted(
            f"stopped before step {done + 1}, as {stop.signal} came: nothing is lost"
        )


def _how_to_go_on(
    done: int, total: int, stop: StopRequest, run: RunConfig, store: Checkpoints | None
) -> str:
    cause = "a host is to be taken away, or another one was asked to stop"
    if stop.signal is not None:
        cause = f"{stop.signal} came"
    elif run.time_limit is not None and jax.process_count() == 1:
        cause = f"run.time_limit={run.time_limit:g} minutes leave no time for another step"
    saved = (
        "run.resume=true goes on from there"
        if store is not None
        else "run.checkpoint=false: nothing of it is saved"
    )
    return f"stopped after step {done} of {total}, as {cause}; {saved}"


def _export_last(
    task: Task, state: TrainState, done: int, folder: pathlib.Path, hooks: Hooks
) -> pathlib.Path:
    """Exports the weights of the last step, which the hooks may keep too."""
    check_weights(state.params, f"step {done}")
    model, params = _export(task, state, folder / MODEL)
    if hooks.loader is not None:
        hooks.loader.keep(str(folder / MODEL), model, params)
    return folder / MODEL


def _export(task: Task, state: TrainState, target: pathlib.Path) -> tuple[Any, Any]:
    """Writes the final weights; a run in one process retries if storage fails."""
    if jax.process_count() > 1:
        return task.export(state, target)
    folder = target.parent

    def safe() -> str:
        return what_is_safe(folder / CHECKPOINTS)

    return retry(lambda: task.export(state, target), str(target), folder, safe=safe)


def _best_so_far(run: RunConfig, store: Checkpoints | None, reporter: Reporter) -> BestStep:
    """Finds the best checkpoint of earlier starts, which is kept from now on."""
    best = BestStep(run.keep_best)
    if store is not None and run.keep_best is not None:
        # Use process 0's evaluations, because it wrote the file.
        text = json.dumps(reporter.evaluations)
        known = json.loads(distributed.all_gather_text("held-out figures", text)[0])
        best.resume({int(step): figures for step, figures in known.items()}, store.steps)
        store.best = best.step
    return best


def _restore(store: Checkpoints, task: Task, run: RunConfig) -> tuple[TrainState, dict[str, Any]]:
    """Restores the newest checkpoint's state and position, and moves the data there.

    Raises:
      ValueError: it does not fit the run, or is beyond the run's end.
    """
    state, position = store.restore(task.state)
    done, batches = position["done"], position["batches"]
    if done > task.total:
        raise ValueError(
            f"run.steps={task.total}: the newest checkpoint in {run.folder} is of step {done}; "
            f"wanted {done} or more, or another folder"
        )
    if run.allow_changes:
        batches = batches | {"checksum": task.batches.checksum}
    task.batches.set_state(batches)
    return state, position


def _open_checkpoints(
    run: RunConfig, folder: pathlib.Path, publish: Callable[[], None] | None
) -> Checkpoints | None:
    """The run's checkpoints.

    Raises:
      ValueError: there are some, but none is complete.
    """
    if not run.checkpoint:
        return None
    some = has_checkpoints(folder)
    store = Checkpoints(folder / CHECKPOINTS, run.keep, publish=publish)
    if distributed.is_main():
        store.remove_unfinished()
    if some and store.latest is None:
        store.close()
        raise ValueError(
            f"{folder / CHECKPOINTS} holds no complete checkpoint; choose another folder, or "
            "replace what is there with --overwrite (run.overwrite=true) in place of run.resume"
        )
    return store


def _close_trackers(trackers: Trackers, error: type[BaseException] | None, *_: object) -> None:
    """Ends the trackers' runs; a run that stopped to be resumed has not failed."""
    trackers.close(failed=error is not None and not issubclass(error, distributed.Preempted))


def _close(store: Checkpoints, error: type[BaseException] | None, *_: object) -> None:
    """Waits for pending saves. That needs every host, so not after a failure on one of several."""
    failed = error is not None and not issubclass(error, distributed.Preempted)
    if distributed.job_failed() or (failed and jax.process_count() > 1):
        return
    # After an error, a second error about the pending save would hide the first.
    with contextlib.suppress(*((Exception,) if failed else ())):
        store.close()
