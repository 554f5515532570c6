"""Reward models: every batch of judged answers is one update."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxalign.algorithms import reward
from jaxalign.models.flops import update_flops
from jaxalign.run.config.runs import RewardRun
from jaxalign.run.tasks.data import judgements, make_data, total_of
from jaxalign.run.tasks.evaluate import RewardEvaluator
from jaxalign.run.tasks.models import load, with_head
from jaxalign.run.tasks.task import Task, cost_of, exporter, optimizer, start


def reward_task(config: RewardRun, mesh: Mesh) -> Task:
    """Reward model: every batch of judged answers is one update."""
    loaded = with_head(load(config.model, mesh, config.run.seed), mesh, config)
    batches, held_out = make_data(judgements(config), config, loaded.tok, mesh)
    total = total_of(config, batches)
    tx = optimizer(config.optimizer, total)
    micro = config.run.micro_batches
    measure = None
    if held_out is not None:
        measure = RewardEvaluator(loaded.model, config.reward, held_out, mesh)
    # `flops` lives as long as the task: it must not hold the weights that the state was made of.
    model, frozen = loaded.model, bool(loaded.frozen)
    flops = lambda batch: update_flops(  # noqa: E731
        model, batch, frozen=frozen, head=False
    )
    return Task(
        *start(
            loaded,
            tx,
            reward.make_step(
                loaded.model, tx, config.reward, micro_batches=micro, sources=batches.sources
            ),
            mesh,
        ),
        batches=batches,
        total=total,
        loop={},
        prepare_updates=lambda key, state, batch, loop, data: ([batch], cost_of(batch, flops)),
        evaluate=None if measure is None else lambda state, loop: measure(state),
        export=exporter(loaded.model, loaded.tok),
        details=None if measure is None else measure.details,
    )
