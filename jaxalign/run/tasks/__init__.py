"""Turns a run's configuration into the training loop's task; has the table of all algorithms.

    configuration → builder → parts → task → loop

A builder makes the parts of a run (`parts.py`): models, step, `prepare`. `plan` and `bench` call
the same builders with other loaders. A `Task` hides from the loop what differs between algorithms:
how a batch of data becomes batches for the step, and what is measured on held-out data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from jax.sharding import Mesh

from jaxalign.data import (
    Batches,
    preference_batches,
    prompt_batches,
    sft_batches,
    unpaired_batches,
)
from jaxalign.run.config.runs import (
    RUNS,
    DPORun,
    KTORun,
    PPORun,
    RewardRun,
    Run,
    SFTRun,
)
from jaxalign.run.export import run_tokenizer
from jaxalign.run.inputs import text_inputs
from jaxalign.run.tasks.data import make_data
from jaxalign.run.tasks.dpo import build_dpo
from jaxalign.run.tasks.kto import build_kto, unpaired_shapes
from jaxalign.run.tasks.loader import FileLoader, Loader
from jaxalign.run.tasks.parts import Parts, RunData, read_data, report_of
from jaxalign.run.tasks.ppo import build_ppo, ppo_task
from jaxalign.run.tasks.reward import (
    build_reward_model,
    judged_batches,
    judged_shapes,
    reward_task,
)
from jaxalign.run.tasks.rows import check_fits, check_rows
from jaxalign.run.tasks.sft import build_sft
from jaxalign.run.tasks.shapes import pair_shapes, prompt_shapes, text_shapes
from jaxalign.run.tasks.task import Task, updates_task, with_averages, with_eval_tasks
from jaxalign.types import TrainState

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Built",
    "Task",
    "algorithm_of_run",
    "build_task",
    "load_data",
    "make_task",
    "register",
]

MakeBatches = Callable[..., Batches[Any]]
"""Such as `jaxalign.data.sft_batches`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A row of the table: everything that commands, `plan` and `bench` know about an algorithm.

    Attributes:
      config: the class of its runs' configurations; its `algorithm` is the name.
      help: one line of help.
      example: the YAML to start from, in `configs/`.
      batches: configuration → what makes its batches.
      shapes: configuration → a batch of data as shapes, without shardings.
      build: (configuration, mesh, loader, data) → (train state, parts).
      task: (configuration, mesh, train state, parts, data) → its task.
    """

    config: type[Run]
    help: str
    example: str
    batches: Callable[[Any], MakeBatches]
    shapes: Callable[[Any], Any]
    build: Callable[[Any, Mesh, Loader, RunData], tuple[TrainState, Parts]]
    task: Callable[[Any, Mesh, TrainState, Any, RunData], Task] = updates_task

    @property
    def name(self) -> str:
        """The name of the command and of the YAML section."""
        return self.config.algorithm


ALGORITHMS: dict[str, Algorithm] = {}
"""Name → row."""


def register(algorithm: Algorithm) -> None:
    """Adds an algorithm, for commands, `load_config`, pipelines, `plan` and `bench`.

    Raises:
      ValueError: another algorithm has this name.
    """
    name = algorithm.name
    if name in ALGORITHMS or RUNS.get(name, algorithm.config) is not algorithm.config:
        raise ValueError(f"algorithm {name!r} is there already; give another name")
    ALGORITHMS[name] = algorithm
    RUNS[name] = algorithm.config


class Built(NamedTuple):
    """A task with its ingredients.

    Attributes:
      task: what the loop runs.
      parts: models, step and `prepare`.
      mesh: the run's mesh.
      tok: the tokenizer.
    """

    task: Task
    parts: Any
    mesh: Mesh
    tok: Any


def make_task(config: Run, loader: Loader | None = None) -> Task:
    """Makes the task of a configuration from `load_config`; reads its data and models.

    Args:
      config: the run's config.
      loader: the loader of its models; files by default.
    """
    return build_task(config, loader).task


def build_task(config: Run, loader: Loader | None = None) -> Built:
    """Like `make_task`, but also returns the parts of the task."""
    algorithm = algorithm_of_run(config)
    mesh = config.mesh.make()
    check_rows(config, mesh)
    tok = run_tokenizer(config.model)
    data = read_data(config, algorithm.batches(config), tok, mesh)
    check_fits(config, data)
    state, parts = algorithm.build(config, mesh, loader or FileLoader(), data)
    task = with_eval_tasks(algorithm.task(config, mesh, state, parts, data), config, tok)
    task = with_averages(task, config)
    task = task._replace(inputs=text_inputs(config, tok), data_report=lambda: report_of(data))
    return Built(task, parts, mesh, tok)


def load_data(config: Run) -> tuple[Any, Batches[Any], Batches[Any] | None]:
    """Tokenizer, training and held-out data, as the run would see them; loads no model."""
    tok = run_tokenizer(config.model)
    return tok, *make_data(algorithm_of_run(config).batches(config), config, tok)


def algorithm_of_run(config: Run) -> Algorithm:
    """The table row of a configuration.

    Raises:
      ValueError: its algorithm was not registered.
    """
    name = type(config).algorithm
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r}: wanted one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


register(
    Algorithm(
        config=SFTRun,
        help="supervised fine-tuning",
        example="sft.yaml",
        batches=lambda config: sft_batches,
        shapes=text_shapes,
        build=build_sft,
    )
)
register(
    Algorithm(
        config=RewardRun,
        help="train a reward model from pairs, rankings, grades or labelled steps",
        example="reward.yaml",
        batches=judged_batches,
        shapes=judged_shapes,
        build=build_reward_model,
        task=reward_task,
    )
)
register(
    Algorithm(
        config=DPORun,
        help="direct preference optimisation and its relatives",
        example="dpo.yaml",
        batches=lambda config: preference_batches,
        shapes=pair_shapes,
        build=build_dpo,
    )
)
register(
    Algorithm(
        config=KTORun,
        help="preference optimisation from single answers marked good or bad",
        example="kto.yaml",
        batches=lambda config: unpaired_batches,
        shapes=unpaired_shapes,
        build=build_kto,
    )
)
register(
    Algorithm(
        config=PPORun,
        help="reinforcement learning against a reward model",
        example="ppo.yaml",
        batches=lambda config: prompt_batches,
        shapes=prompt_shapes,
        build=build_ppo,
        task=ppo_task,
    )
)
