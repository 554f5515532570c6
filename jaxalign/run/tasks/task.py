"""What the training loop needs of an algorithm, and the parts that algorithms share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import Mesh

from jaxalign.algorithms.compile import CompiledStep, compile_step
from jaxalign.algorithms.loss import Loss
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import Step, make_eval
from jaxalign.data import Batches
from jaxalign.hf import save_pretrained
from jaxalign.models.base import combine
from jaxalign.models.flops import work_of
from jaxalign.parallel.sharding import shard_batch
from jaxalign.run.export import whole_model
from jaxalign.run.metrics import FLOPS, TOKENS, add_up
from jaxalign.run.tasks.models import Loaded
from jaxalign.types import TrainState

Floats = dict[str, float]
Loop = dict[str, Any]
"""JSON-able state of the loop besides the train state: the KL coefficient of PPO."""


class Task(NamedTuple):
    """What the loop needs of an algorithm.

    Attributes:
      state: the train state at the start.
      step: compiled.
      batches: training data.
      total: batches (iterations, in PPO) in all.
      loop: starting value of the loop's own state.
      prepare_updates: (key, state, batch, loop, data) → (batches for the step, metrics known before
        the update). May change `loop`, and may take further batches from the iterator `data`.
        Among the metrics are `TOKENS` and `FLOPS`: real tokens and model FLOPs of this process's
        rows, of which the loop makes rates.
      evaluate: (state, loop) → held-out figures, or None without held-out data.
      export: (state, folder) → None; writes the weights in Hugging Face form.
      on_train_start: (state, loop) → None; called once, before a run that is not resumed, to fill
        `loop`.
      early_stop: metrics of an update → whether to skip the other updates of this batch; None:
        never.
      async_metrics: whether a step may be dispatched before the last one's metrics are read. False
        where `prepare_updates` waits for the devices in any case.
      details: curves and tables of the last evaluation, JSON-able, or None.
    """

    state: TrainState
    step: CompiledStep
    batches: Batches[Any]
    total: int
    loop: Loop
    prepare_updates: Callable[
        [jax.Array, TrainState, Any, Loop, Iterator[Any]], tuple[Iterable[Any], Floats]
    ]
    evaluate: Callable[[TrainState, Loop], Floats] | None
    export: Callable[[TrainState, Any], None]
    details: Callable[[], dict[str, Any]] | None = None
    on_train_start: Callable[[TrainState, Loop], None] | None = None
    early_stop: Callable[[dict[str, Any]], bool] | None = None
    async_metrics: bool = True


def optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """The optimizer whose schedule ends with the run, unless the configuration says otherwise."""
    if config.total_steps is None:
        config = dataclasses.replace(config, total_steps=updates)
    return make_optimizer(config)


def start(
    loaded: Loaded, tx: optax.GradientTransformation, step: Step, mesh: Mesh
) -> tuple[TrainState, CompiledStep]:
    """The state at the start, and the step compiled for it."""
    state = init_state(loaded.params, tx, loaded.frozen)
    return state, compile_step(step, state, mesh)


def evaluator(
    loss: Loss,
    held_out: Batches[Any] | None,
    mesh: Mesh,
    prepare: Callable[[TrainState, Any], Any] = lambda state, batch: batch,
) -> Callable[[TrainState, Loop], Floats] | None:
    """Held-out figures: sums over all batches, divided once; None without held-out data."""
    if held_out is None:
        return None
    batches, evaluate = held_out, make_eval(loss)

    def run(state: TrainState, loop: Loop) -> Floats:
        with jax.set_mesh(mesh):
            parts = [evaluate(state, shard_batch(prepare(state, b), mesh)) for b in batches]
            return add_up(parts)

    return run


def updates_task(
    loaded: Loaded,
    state: TrainState,
    step: CompiledStep,
    batches: Batches[Any],
    *,
    total: int,
    flops: Callable[[Any], float],
    evaluate: Callable[[TrainState, Loop], Floats] | None,
    prepare: Callable[[TrainState, Any], Any] = lambda state, batch: batch,
) -> Task:
    """The task in which every batch, once prepared, is one update of so many model FLOPs."""
    return Task(
        state,
        step,
        batches=batches,
        total=total,
        loop={},
        prepare_updates=lambda key, state, batch, loop, data: (
            [prepare(state, batch)],
            cost_of(batch, flops),
        ),
        evaluate=evaluate,
        export=exporter(loaded.model, loaded.tok),
    )


def cost_of(batch: Any, flops: Callable[[Any], float]) -> Floats:
    """A batch's real tokens and model FLOPs, as `Task.prepare_updates` gives them."""
    return {TOKENS: work_of(batch).tokens, FLOPS: flops(batch)}


def exporter(model: Any, tok: Any) -> Callable[[TrainState, Any], None]:
    """Writes the trained weights, adapters folded in, in Hugging Face form."""

    def export(state: TrainState, folder: Any) -> None:
        plain, params = whole_model(model, combine(state.params, state.frozen))
        save_pretrained(plain, params, folder, tokenizer=tok)

    return export
