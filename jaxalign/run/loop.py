"""The training loop, for all algorithms: set up, resume, loop, evaluate, save, export."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from jaxalign.data import filled
from jaxalign.parallel import distributed
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.config.runs import RunConfig
from jaxalign.run.record import check_hosts, write_record
from jaxalign.run.reporter import Reporter, StepRecord, pop_work
from jaxalign.run.stopping import StopRequest, stop_on_signals
from jaxalign.run.tasks import Task, make_task
from jaxalign.run.tasks.task import Loop
from jaxalign.types import TrainState


class Result(NamedTuple):
    """What a run leaves.

    Attributes:
      folder: the run's folder.
      model: folder of the exported weights, or None.
      before: held-out figures before the first update ({} without held-out data, or resumed).
      after: held-out figures after the last.
      history: the metrics of every step of this process, oldest first.
      seconds: wall time, set-up and compilation included.
    """

    folder: pathlib.Path
    model: pathlib.Path | None
    before: dict[str, float]
    after: dict[str, float]
    history: list[dict[str, float]]
    seconds: float


def train(config: Any, title: str | None = None) -> Result:
    """Runs one configuration to its end; on several hosts, within `distributed.session()`.

    Killed anywhere and started again with `run.resume=true`, it goes on from the newest
    checkpoint and gives bit for bit the metrics of an uninterrupted run on the same mesh (all but
    those under `time/`).

    Args:
      config: from `load_config`.
      title: shown beside the progress bar.

    Raises:
      ValueError: a wrong configuration or input.
      FloatingPointError: the loss is no longer a number.
      jaxalign.parallel.distributed.Preempted: SIGTERM or Ctrl-C; a checkpoint was saved.
    """
    # However the run ends, saves under way are finished and files closed.
    with contextlib.ExitStack() as stack, config.mesh.use_rules():
        stop = stack.enter_context(stop_on_signals())
        return _train(config, title, stack, stop)


def _train(
    config: Any, title: str | None, stack: contextlib.ExitStack, stop: StopRequest
) -> Result:
    began = time.perf_counter()
    run: RunConfig = config.run
    folder = pathlib.Path(run.folder)
    check_hosts(folder, config)

    # ---------------------------------------------------------------- models, data, step
    task = make_task(config)
    state, loop, done = task.state, task.loop, 0

    # ---------------------------------------------------------------- resume
    store = _open_checkpoints(run, folder)
    if store is not None:
        stack.push(functools.partial(_close, store))
        if run.resume and store.latest is not None:
            state, position = store.restore(state)
            loop, done = position["loop"], position["done"]
            task.batches.set_state(position["batches"])
    # The first step donates the state that the task began with: `state` is the one to use.
    task = task._replace(state=state)

    # ---------------------------------------------------------------- before the first step
    write_record(folder, config)
    name = title or type(config).__name__.removesuffix("Run").lower()
    reporter = Reporter(folder, name, task.total, done, run.log_every)
    stack.callback(reporter.close)
    stack.callback(task.batches.close)
    if task.on_train_start is not None and done == 0:
        task.on_train_start(state, loop)
    before = _evaluate(task, state, loop, 0, reporter) if done == 0 else {}
    after, saved_at = before, done
    batches = iter(task.batches)
    root = jax.random.key(run.seed)
    reporter.start_clock()

    # ---------------------------------------------------------------- the loop
    while done < task.total:
        key = jax.random.fold_in(root, done)
        state, record = _step(task, key, state, loop, batches, done + 1)
        done += 1
        preempted = distributed.preempted(done) or stop.signal is not None
        evaluates = bool(run.eval_every) and done % run.eval_every == 0 and done < task.total
        saves = preempted or bool(run.save_every and done % run.save_every == 0)
        # A step's metrics are read once the next step is under way, so that no device waits for
        # this loop; but no state is saved or evaluated before its own metrics were found finite.
        settle = evaluates or saves or done == task.total or not task.async_metrics
        reporter.add(record, keep=0 if settle else 1)
        if evaluates:
            after = _evaluate(task, state, loop, done, reporter)
        if saves:
            _save(store, task, state, loop, done)
            saved_at = done
        if preempted:
            raise distributed.Preempted(_how_to_go_on(done, task.total, stop, store))
        if evaluates or saves:
            reporter.start_clock()

    # ---------------------------------------------------------------- after the last step
    reporter.close_bar()
    if reporter.history:
        after = _evaluate(task, state, loop, done, reporter)
    if saved_at != done:
        _save(store, task, state, loop, done)
    exported = folder / "model" if run.export else None
    if exported is not None:
        task.export(state, exported)
    seconds = time.perf_counter() - began
    return Result(folder, exported, before, after, reporter.history, seconds)


def _step(
    task: Task,
    key: jax.Array,
    state: TrainState,
    loop: Loop,
    batches: Iterator[Any],
    number: int,
) -> tuple[TrainState, StepRecord]:
    """One batch: what the algorithm makes of it, and an update for each part.

    Returns before the devices are done.
    """
    asked_at = time.perf_counter()
    batch = next(batches)
    waited = time.perf_counter() - asked_at
    parts, metrics = task.prepare_updates(key, state, batch, loop, batches)
    timing = {name: metrics.pop(name) for name in list(metrics) if name.startswith("time/")}
    counts = distributed.all_reduce_sum([*filled(batch), *pop_work(timing)])
    updates: list[dict[str, Any]] = []
    for part in parts:
        state, logged = task.step(state, part)
        updates.append(logged)
        if task.early_stop is not None and task.early_stop(logged):
            break
    if task.early_stop is not None:
        metrics = metrics | {"updates": len(updates)}
    timing |= {"time/data": waited}
    record = StepRecord(number, updates, metrics, timing, counts, task.step.compiles)
    return state, record


def _evaluate(
    task: Task, state: TrainState, loop: Loop, step: int, reporter: Reporter
) -> dict[str, float]:
    """Held-out figures, written down; none without held-out data."""
    if task.evaluate is None:
        return {}
    figures = task.evaluate(state, loop)
    reporter.evaluation(step, figures, None if task.details is None else task.details())
    return figures


def _how_to_go_on(done: int, total: int, stop: StopRequest, store: Checkpoints | None) -> str:
    cause = "a host is to be taken away" if stop.signal is None else f"{stop.signal} came"
    saved = (
        "run.resume=true goes on from there"
        if store is not None
        else "run.checkpoint=false: nothing of it is saved"
    )
    return f"stopped after step {done} of {total}, as {cause}; {saved}"


def _save(store: Checkpoints | None, task: Task, state: TrainState, loop: Loop, done: int) -> None:
    if store is not None:
        position = {"loop": loop, "done": done, "batches": task.batches.get_state()}
        store.save(done, state, position)


def _open_checkpoints(run: RunConfig, folder: pathlib.Path) -> Checkpoints | None:
    """The run's checkpoints; refuses to mix two runs in one folder.

    Raises:
      ValueError: `folder` holds checkpoints of an earlier run that is not to be resumed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not run.checkpoint:
        return None
    store = Checkpoints(folder / "checkpoints", run.keep)
    if store.latest is not None and not run.resume:
        latest = store.latest
        store.close()
        raise ValueError(
            f"run.folder={str(folder)!r} holds checkpoints of an earlier run, up to step "
            f"{latest}; set run.resume=true to go on with it, or choose another folder"
        )
    return store


def _close(store: Checkpoints, error: type[BaseException] | None, *_: object) -> None:
    """Finishes saves under way, which needs every host: not after a failure on one of several."""
    failed = error is not None and not issubclass(error, distributed.Preempted)
    if not distributed.job_failed() and not (failed and jax.process_count() > 1):
        store.close()
