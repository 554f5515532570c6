"""What the training loop needs from an algorithm, and the task with one update per batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.averages import averaged_params
from jaxalign.algorithms.compile import CompiledStep
from jaxalign.algorithms.optim import averages_for
from jaxalign.algorithms.step import Loss, make_eval
from jaxalign.data import Batches
from jaxalign.hf import save_pretrained
from jaxalign.models.base import combine
from jaxalign.models.flops import work_of
from jaxalign.parallel.sharding import shard_batch
from jaxalign.run.config.base import ModelConfig
from jaxalign.run.evaluation.tasks import TaskEvaluator
from jaxalign.run.export import exported_tokenizer, whole_model
from jaxalign.run.metrics import FLOPS, TOKENS, add_up
from jaxalign.run.quantized_export import whole_floats
from jaxalign.run.tasks.parts import BatchPrepare, Parts, RunData, learning_rates
from jaxalign.types import Params, TrainState

Floats = dict[str, float]
Loop = dict[str, Any]
"""JSON-able state of the loop besides the train state, such as PPO's KL coefficient."""

_BATCHES = "perturbed_batches"
"""Entry of the loop's state: the number of batches with noise so far."""


class Task(NamedTuple):
    """What the loop needs from an algorithm.

    Attributes:
      state: the train state at the start.
      step: compiled.
      batches: training data.
      total: batches (iterations, in PPO) in all.
      loop: starting value of the loop's own state.
      prepare_updates: (key, state, batch, loop, data) → (batches for the step, metrics known before
        the update). May change `loop`, and may take further batches from the iterator `data`. The
        metrics include `TOKENS` and `FLOPS`: real tokens and model FLOPs of this process's rows,
        from which the loop computes rates.
      evaluate: (state, loop) → held-out metrics, or None without held-out data.
      export: (state, folder) → (model, parameters) without adapters; writes the weights in Hugging
        Face form.
      policy: state → (the language model without adapters, its parameters); None: the task trains
        no language model.
      details: curves and tables of the last evaluation, JSON-able, or None.
      on_train_start: (state, loop) → None; called once, before a run that is not resumed, to fill
        `loop`.
      early_stop: metrics of an update → whether to skip the other updates of this batch; None:
        never.
      end_with: (state, batches done) → None to continue, or the final train state, which ends the
        run now. It is called with every state after its updates; if it returns a state later, that
        must be a copy.
      learning_rates: names of rates → the rate of each update of the run, float32 `[updates]`, as
        metrics.
      inputs: names of inputs that affect the batches besides options and files → digests, see
        `run.inputs`.
      data_report: () → a text on how the data's rows and columns were used.
      async_metrics: whether a step may be dispatched before the previous step's metrics are read.
        False if `prepare_updates` waits for the devices anyway.
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
    export: Callable[[TrainState, Any], tuple[Any, Params]]
    policy: Callable[[TrainState], tuple[Any, Params]] | None = None
    details: Callable[[], dict[str, Any]] | None = None
    on_train_start: Callable[[TrainState, Loop], None] | None = None
    early_stop: Callable[[dict[str, Any]], bool] | None = None
    end_with: Callable[[TrainState, int], TrainState | None] | None = None
    async_metrics: bool = True
    learning_rates: Mapping[str, np.ndarray] = MappingProxyType({})
    inputs: Mapping[str, str] = MappingProxyType({})
    data_report: Callable[[], str] = str


def updates_task(config: Any, mesh: Mesh, state: TrainState, parts: Parts, data: RunData) -> Task:
    """The task in which every prepared batch is one update."""

    def prepare_updates(
        key: jax.Array, state: TrainState, batch: Any, loop: Loop, more: Iterator[Any]
    ) -> tuple[Iterable[Any], Floats]:
        flops = parts.update_flops(batch) + parts.prepare_flops(batch)
        cost = {TOKENS: work_of(batch).tokens, FLOPS: flops}
        if parts.perturb is not None:
            batch = parts.perturb(batch, loop[_BATCHES])
            loop[_BATCHES] += 1
        return [batch if parts.prepare is None else parts.prepare(state, batch)], cost

    evaluate = None
    if data.held_out is not None and parts.loss is not None:
        evaluate = evaluator(parts.loss, data.held_out, mesh, parts.prepare)
    return Task(
        state,
        parts.step,
        batches=data.batches,  # pyrefly: ignore[bad-argument-type]
        total=data.total,
        loop={} if parts.perturb is None else {_BATCHES: 0},
        prepare_updates=prepare_updates,
        evaluate=evaluate,
        export=exporter(parts.policy, data.tok, config.model),
        policy=whole_policy(parts.policy),
        learning_rates={"learning_rate": learning_rates(config.optimizer, data.total)},
    )


def with_averages(task: Task, config: Any) -> Task:
    """The task, evaluating and exporting averages of the weights if the optimizer has them."""
    uses = averages_for(config.optimizer)

    def average(state: TrainState) -> TrainState:
        return state._replace(params=averaged_params(state))

    evaluate, export = task.evaluate, task.export
    if "eval" in uses and evaluate is not None:
        task = task._replace(evaluate=lambda state, loop: evaluate(average(state), loop))
    if "export" in uses:
        task = task._replace(export=lambda state, folder: export(average(state), folder))
    return task


def evaluator(
    loss: Loss, held_out: Batches[Any], mesh: Mesh, prepare: BatchPrepare | None = None
) -> Callable[[TrainState, Loop], Floats]:
    """Held-out metrics: sums over all batches, divided once."""
    evaluate = make_eval(loss)

    def run(state: TrainState, loop: Loop) -> Floats:
        sums = []
        with jax.set_mesh(mesh):
            for batch in held_out:
                ready = batch if prepare is None else prepare(state, batch)
                sums.append(evaluate(state, shard_batch(ready, mesh)))
            return add_up(sums)

    return run


def with_eval_tasks(task: Task, config: Any, tok: Any) -> Task:
    """The task, which also evaluates `run.eval_tasks` after the held-out data."""
    run = config.run
    if not run.eval_tasks:
        return task
    if task.policy is None:
        raise ValueError("run.eval_tasks: this algorithm trains no language model; remove it")
    measure = TaskEvaluator(run.eval_tasks, tok, config.model.chat_template, config.data.thinking)
    evaluate, policy = task.evaluate, task.policy

    def both(state: TrainState, loop: Loop) -> Floats:
        figures = {} if evaluate is None else evaluate(state, loop)
        figures = figures | measure(*policy(state))
        measure.forget()  # the next step donates the arrays
        return figures

    return task._replace(evaluate=both)


def whole_policy(model: Any, part: str | None = None) -> Callable[[TrainState], tuple[Any, Params]]:
    """The trained model of a state, with adapters merged if the base is in floats.

    Args:
      model: the trained model.
      part: its key in the state's parameters; None: they are all its own.
    """

    def whole(state: TrainState) -> tuple[Any, Params]:
        params = combine(state.params, state.frozen)
        params = params if part is None else params[part]
        # A quantised base in floats may not fit beside the run, so keep it quantised.
        return (model, params) if model.quantize is not None else whole_model(model, params)

    return whole


def exporter(
    model: Any, tok: Any, config: ModelConfig, part: str | None = None
) -> Callable[[TrainState, Any], tuple[Any, Params]]:
    """Writes the trained weights, with adapters merged, in Hugging Face form.

    Args:
      model: the trained model.
      tok: its tokenizer.
      config: the config of the model it started from.
      part: the model's key in the state's parameters; None: they are all its own.
    """

    def export(state: TrainState, folder: Any) -> tuple[Any, Params]:
        params = combine(state.params, state.frozen)
        plain, params = whole_floats(model, params if part is None else params[part], config)
        save_pretrained(plain, params, folder, tokenizer=exported_tokenizer(tok))
        return plain, params

    return export
