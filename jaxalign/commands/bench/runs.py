"""Steps and iterations of a run: from the user's configuration, or of a case on random arrays."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.commands.bench.case import Case, Runner, Sample
from jaxalign.commands.bench.random import RandomLoader
from jaxalign.commands.bench.rows import RandomBatches
from jaxalign.data import filled
from jaxalign.run.config.base import Run
from jaxalign.run.metrics import FLOPS, TOKENS
from jaxalign.run.tasks import ALGORITHMS, Task, make_task
from jaxalign.run.tasks.parts import BatchPrepare, RunData
from jaxalign.run.tasks.rows import check_rows
from jaxalign.types import TrainState


def config_runner(config: Run) -> Runner:
    """Runs one batch of a run, including the wait for data; writes nothing.

    Args:
      config: from `load_config`.
    """
    task = make_task(config)
    if task.on_train_start is not None:
        task.on_train_start(task.state, task.loop)
    return _task_runner(task, config.run.seed, {})


def case_runner(case: Case, mesh: Mesh) -> Runner:
    """Runs one batch of an algorithm, built like a run, with random weights and data."""
    algorithm, config = ALGORITHMS[case.what], case.config(mesh)
    check_rows(config, mesh)
    batches = RandomBatches(case, algorithm.shapes(config))
    data = RunData(_MANY, batches=batches)  # pyrefly: ignore[bad-argument-type]
    state, parts = algorithm.build(config, mesh, RandomLoader(), data)
    seconds: dict[str, float] = {}
    if parts.prepare is not None:
        parts = dataclasses.replace(parts, prepare=_timed(parts.prepare, seconds))
    task = algorithm.task(config, mesh, state, parts, data)
    del state
    return _task_runner(task, 0, seconds)


_MANY = 10**6
"""Steps of a run that is not run to its end."""


def _timed(prepare: BatchPrepare, seconds: dict[str, float]) -> BatchPrepare:
    """Wraps a function to block on its result and add its time to `seconds`."""

    def run(state: TrainState, batch: Any) -> Any:
        start = time.perf_counter()
        ready = jax.block_until_ready(prepare(state, batch))
        seconds["reference"] = time.perf_counter() - start
        return ready

    return dataclasses.replace(prepare, run=run)


def _task_runner(task: Task, seed: int, timed: dict[str, float]) -> Runner:
    """Runs a task batch by batch.

    Args:
      task: the loop's task.
      seed: the seed of its random choices.
      timed: seconds of parts that are timed elsewhere, reset for every batch.
    """
    state, loop, key, done = task.state, task.loop, jax.random.key(seed), 0
    task = task._replace(state=None)  # pyrefly: ignore[bad-argument-type]
    data: Iterable[Any] = task.batches
    batches = iter(data)

    def run() -> Sample:
        nonlocal state, batches, done
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # the data is shorter than the measurement: start again
            batches = iter(data)
            batch = next(batches)
        parts = {"data": time.perf_counter() - start}
        updates, figures = task.prepare_updates(
            jax.random.fold_in(key, done), state, batch, loop, batches
        )
        done += 1
        for update in updates:
            state, metrics = task.step(state, update)
            jax.block_until_ready(metrics)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        tokens, flops = figures.pop(TOKENS), figures.pop(FLOPS)
        parts |= timed
        parts |= {
            name.removeprefix("time/"): value
            for name, value in figures.items()
            if name.startswith("time/")
        }
        parts["update"] = seconds - sum(parts.values())
        full, room = filled(batch)
        return Sample(seconds, tokens, flops, parts, 1 - full / room)

    return Runner(run, lambda: task.step.compiles)
