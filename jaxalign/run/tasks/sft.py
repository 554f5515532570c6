"""Supervised fine-tuning: every batch of conversations is one update."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxalign.algorithms import sft
from jaxalign.data import sft_batches
from jaxalign.models.flops import update_flops
from jaxalign.run.config.runs import SFTRun
from jaxalign.run.tasks.data import make_data, names_of, total_of
from jaxalign.run.tasks.models import load_policy
from jaxalign.run.tasks.task import Task, evaluator, optimizer, start, updates_task


def sft_task(config: SFTRun, mesh: Mesh) -> Task:
    """SFT: every batch of conversations is one update."""
    loaded = load_policy(config.model, mesh, config.run.seed)
    batches, held_out = make_data(sft_batches, config, loaded.tok, mesh)
    total = total_of(config, batches)
    tx = optimizer(config.optimizer, total)
    micro = config.run.micro_batches
    state, step = start(
        loaded,
        tx,
        sft.make_step(loaded.model, tx, config.sft, micro_batches=micro, sources=batches.sources),
        mesh,
    )
    loss = sft.make_loss(loaded.model, config.sft, sources=names_of(held_out))
    evaluate = evaluator(loss, held_out, mesh)
    # `flops` lives as long as the task: it must not hold the weights that the state was made of.
    model, frozen = loaded.model, bool(loaded.frozen)
    return updates_task(
        loaded,
        state,
        step,
        batches,
        total=total,
        flops=lambda batch: update_flops(model, batch, frozen=frozen),
        evaluate=evaluate,
    )
