"""The parts of a run, built once from its configuration: with arrays, or with shapes.

    configuration, loader, data → builder → (train state, parts)

The loader determines the arrays: from files (a run), shapes with shardings (`plan`), or random
numbers (`bench`). All other code is the same, so plans and benchmarks match real runs.

Only the train state, which steps donate, holds the trained arrays. Parts live as long as the run
and hold models, programs and frozen parameters, but never the initial trained arrays.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithms.compile import CompiledStep
from jaxalign.algorithms.guard import skip_spikes
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer, make_schedule
from jaxalign.algorithms.step import Loss
from jaxalign.data import Batches
from jaxalign.models.flops import Work, forward_flops, training_flops, work_of
from jaxalign.models.scorer import Scorer
from jaxalign.run.config.base import Run, RunConfig
from jaxalign.run.tasks.data import make_data, names_of, total_of
from jaxalign.run.tasks.reference import Reference
from jaxalign.types import Params, TrainState


class RunData(NamedTuple):
    """The data of a run, or what is known about it without reading it.

    Attributes:
      total: batches to train on (iterations, in PPO).
      tok: the policy's tokenizer; None: no data is read.
      batches: training data, or None.
      held_out: held-out data, or None.
      stop_tokens: the ids that end an answer, if there is no tokenizer.
    """

    total: int
    tok: Any = None
    batches: Batches[Any] | None = None
    held_out: Batches[Any] | None = None
    stop_tokens: tuple[int, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the training data's sources, for which metrics are also logged."""
        return names_of(self.batches)

    @property
    def held_out_sources(self) -> tuple[str, ...]:
        """Names of the held-out data's sources."""
        return names_of(self.held_out)


def read_data(config: Run, make: Callable[..., Batches[Any]], tok: Any, mesh: Any) -> RunData:
    """Reads the data that a configuration names.

    Args:
      config: the run's config.
      make: the function that makes batches, such as `jaxalign.data.sft_batches`.
      tok: the tokenizer.
      mesh: determines this host's rows.
    """
    batches, held_out = make_data(make, config, tok, mesh)
    return RunData(total_of(config, batches), tok, batches, held_out)


def report_of(data: RunData) -> str:
    """How the rows and columns of a run's data were used; when streaming, of those read so far."""
    named = {"training data": data.batches, "held-out data": data.held_out}
    return "\n\n".join(
        f"{name}\n{batches.report}" for name, batches in named.items() if batches is not None
    )


def unread_data(config: Run) -> RunData:
    """Data for compiling only: the configured number of batches, or enough for the schedule."""
    steps = config.run.steps
    if steps is None:  # longer than the warm-up
        ratio = config.optimizer.warmup_ratio
        steps = math.ceil(1 / (1 - ratio)) + 1 if ratio else config.optimizer.warmup_steps + 1
    return RunData(steps, stop_tokens=(0,))


@dataclasses.dataclass(frozen=True)
class BatchPrepare:
    """Adds frozen models' outputs to a batch of data before the step.

    Attributes:
      run: (state, batch) → batch.
      shapes: batch as shapes → the result of `run` as shapes.
      lower: (state, batch), as arrays or shapes → the lowered program of `run`; None: it compiles
        nothing.
    """

    run: Callable[[TrainState, Any], Any]
    shapes: Callable[[Any], Any]
    lower: Callable[[TrainState, Any], jax.stages.Lowered] | None

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """Runs it."""
        return self.run(state, batch)


def no_work(batch: Any) -> Work:
    """The work of a part that reads nothing."""
    return Work()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run in which every batch of data is one update.

    Attributes:
      policy: the model that is trained.
      adapted: whether adapters are trained over a frozen base.
      step: compiled, for the train state that was made with it.
      loss: of held-out data.
      prepare: adds what frozen models compute to a batch; None: nothing.
      reference: the reference, if there is one.
      perturb: (batch, number) → the training batch with noise, where number counts batches from 0;
        None: no noise.
      update_work: batch → the work of the update, for FLOPs.
      prepare_work: batch → the work of `prepare`, for models shaped like the policy.
      notes: assumptions, one sentence each.
    """

    policy: Any
    adapted: bool
    step: CompiledStep
    loss: Loss | None = None
    prepare: BatchPrepare | None = None
    reference: Reference | None = None
    perturb: Callable[[Any, int], Any] | None = None
    update_work: Callable[[Any], Work] = work_of
    prepare_work: Callable[[Any], Work] = no_work
    notes: tuple[str, ...] = ()

    @property
    def has_head(self) -> bool:
        """Whether the loss uses the vocabulary head."""
        return not isinstance(self.policy, Scorer)

    @property
    def frozen_params(self) -> tuple[Params, ...]:
        """Frozen parameters in memory; some may also be in the train state."""
        held = None if self.reference is None else self.reference.held
        return () if held is None else (held,)

    def update_flops(self, batch: Any) -> float:
        """Model FLOPs of one update: the forward pass, and the gradients."""
        work = self.update_work(batch)
        return training_flops(self.policy, work, frozen=self.adapted, head=self.has_head)

    def prepare_flops(self, batch: Any) -> float:
        """Model FLOPs of `prepare`."""
        return self._forward(self.prepare_work(batch))

    def _forward(self, work: Work) -> float:
        return forward_flops(self.policy.config, work, head=self.has_head)


def scheduled_optimizer(config: OptimizerConfig, updates: int) -> optax.GradientTransformation:
    """The optimizer whose schedule ends with the run, unless the configuration says otherwise."""
    return make_optimizer(_with_end(config, updates))


def learning_rates(config: OptimizerConfig, updates: int) -> np.ndarray:
    """The rate of each update of `scheduled_optimizer`, float32 `[updates]`.

    They are computed all at once in advance, so that no step waits for its rate.
    """
    schedule = make_schedule(_with_end(config, updates))

    def rate(number: jax.Array) -> jax.Array:
        return jnp.asarray(schedule(number), jnp.float32)

    return np.asarray(jax.vmap(rate)(jnp.arange(updates)))


def _with_end(config: OptimizerConfig, updates: int) -> OptimizerConfig:
    """The options, with `total_steps` filled in if missing."""
    if config.total_steps is not None:
        return config
    return dataclasses.replace(config, total_steps=updates)


def with_guard(tx: optax.GradientTransformation, run: RunConfig) -> optax.GradientTransformation:
    """The optimizer, wrapped by `skip_spikes` if configured."""
    return tx if run.skip_spikes is None else skip_spikes(tx, run.skip_spikes)
