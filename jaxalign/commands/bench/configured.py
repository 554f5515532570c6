"""A run's own configuration: its model, its data, its loop, a few steps of it."""

from __future__ import annotations

import time
from typing import Any

import jax

from jaxalign.commands.bench.case import Runner, Sample
from jaxalign.data import filled
from jaxalign.run.metrics import FLOPS, TOKENS
from jaxalign.run.tasks import make_task


def config_runner(config: Any) -> Runner:
    """One batch of a run: what it waits for, what it computes. Nothing is written.

    Args:
      config: from `load_config`.
    """
    task = make_task(config)
    state, loop = task.state, task.loop
    if task.on_train_start is not None:
        task.on_train_start(state, loop)
    batches, key, done = iter(task.batches), jax.random.key(config.run.seed), 0

    def run() -> Sample:
        nonlocal state, batches, done
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:  # the data is shorter than the measurement: once more
            batches = iter(task.batches)
            batch = next(batches)
        marks = {"data": time.perf_counter() - start}
        updates, figures = task.prepare_updates(
            jax.random.fold_in(key, done), state, batch, loop, batches
        )
        done += 1
        for part in updates:
            state, metrics = task.step(state, part)
            jax.block_until_ready(metrics)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
        tokens, flops = figures.pop(TOKENS), figures.pop(FLOPS)
        known = {k.removeprefix("time/"): v for k, v in figures.items() if k.startswith("time/")}
        marks |= known
        marks["update"] = seconds - sum(marks.values())
        full, room = filled(batch)
        return Sample(seconds, tokens, flops, marks, 1 - full / room)

    return Runner(run, lambda: task.step.compiles)
