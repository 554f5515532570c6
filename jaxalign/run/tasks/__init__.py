"""From a run's configuration to what the training loop turns: a file an algorithm.

A `Task` hides from the loop what differs between algorithms: how a batch of data becomes batches
for the step (nothing in SFT and reward modelling, reference log-probabilities in DPO, a rollout
cut into mini-batches in PPO), and what is measured on held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from jaxalign.parallel.sharding import row_axes, row_shards
from jaxalign.run.config.runs import DPORun, KTORun, PPORun, RewardRun, SFTRun
from jaxalign.run.tasks.data import load_data
from jaxalign.run.tasks.dpo import dpo_task
from jaxalign.run.tasks.kto import kto_task
from jaxalign.run.tasks.ppo import ppo_task
from jaxalign.run.tasks.reward import reward_task
from jaxalign.run.tasks.sft import sft_task
from jaxalign.run.tasks.task import Task

__all__ = [
    "Task",
    "dpo_task",
    "kto_task",
    "load_data",
    "make_task",
    "ppo_task",
    "reward_task",
    "sft_task",
]


def make_task(config: Any) -> Task:
    """The task of a configuration made by `load_config`."""
    mesh = config.mesh.make()
    _check_rows(config, mesh)
    makers: dict[type, Callable[..., Task]] = {
        SFTRun: sft_task,
        RewardRun: reward_task,
        DPORun: dpo_task,
        KTORun: kto_task,
        PPORun: ppo_task,
    }
    return makers[type(config)](config, mesh)


def _check_rows(config: Any, mesh: Mesh) -> None:
    """Refuses a batch that cannot be split evenly, before anything is loaded or sampled."""
    parts = {row_axes(mesh): row_shards(mesh), "run.micro_batches": config.run.micro_batches}
    answers, what = config.data.rows, "rows"
    if isinstance(config, PPORun):
        parts["minibatches"] = config.minibatches
        if config.ppo.samples > 1:
            answers, what = answers * config.ppo.samples, "answers (× ppo.samples)"
    unit = math.prod(parts.values())
    if answers % unit:
        raise ValueError(
            f"data.rows={config.data.rows}: {answers} {what} do not divide into "
            f"{', '.join(f'{name} = {size}' for name, size in parts.items())}; "
            f"use a multiple of {unit} {what}"
        )
    for model in config.mesh.apart:
        unit = row_shards(config.mesh.make(model=model))
        if answers % unit:
            raise ValueError(
                f"data.rows={config.data.rows}: {answers} {what} do not divide over "
                f"mesh.apart.{model} = {unit} devices; use a multiple of {unit} {what}"
            )
    texts = {"data": config.data, "ptx": getattr(config, "ptx", None)}
    for name, section in texts.items():
        unit = row_shards(mesh) * (config.run.micro_batches if name == "ptx" else 1)
        if section is not None and section.rows % unit:
            raise ValueError(
                f"{name}.rows={section.rows}: the rows do not divide over the mesh and its "
                f"micro-batches; use a multiple of {unit} rows"
            )
