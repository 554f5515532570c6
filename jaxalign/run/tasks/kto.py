"""KTO: a batch of answers gets what policy and reference say of it, then is one update."""

from __future__ import annotations

import functools
from typing import Any

from jax.sharding import Mesh

from jaxalign.algorithms import kto
from jaxalign.data import unpaired_batches
from jaxalign.models.flops import forward_flops, update_flops, work_of
from jaxalign.run.config.runs import KTORun
from jaxalign.run.tasks.data import make_data, names_of, total_of
from jaxalign.run.tasks.models import load_policy, reference_model
from jaxalign.run.tasks.reference import hold_reference, reference_optimizer
from jaxalign.run.tasks.task import Task, evaluator, optimizer, start, updates_task


def kto_task(config: KTORun, mesh: Mesh) -> Task:
    """KTO: a batch of answers gets what policy and reference say of it, then is one update."""
    loaded = load_policy(config.model, mesh, config.run.seed)
    load = functools.partial(reference_model, loaded=loaded, config=config.model, mesh=mesh)
    batches, held_out = make_data(unpaired_batches, config, loaded.tok, mesh)
    total = total_of(config, batches)
    tx = reference_optimizer(optimizer(config.optimizer, total), config.reference_sync)
    micro = config.run.micro_batches
    state, step = start(
        loaded,
        tx,
        kto.make_step(loaded.model, tx, config.kto, micro_batches=micro, sources=batches.sources),
        mesh,
    )
    state, reference = hold_reference(config, loaded, state, load)
    add = kto.make_prepare(loaded.model, reference.model)
    prepare = lambda state, batch: add(state, reference.params(state), batch)  # noqa: E731
    loss = kto.make_loss(loaded.model, config.kto, sources=names_of(held_out))
    evaluate = evaluator(loss, held_out, mesh, prepare)
    # `flops` lives as long as the task: it must not hold the weights that the state was made of.
    model, frozen = loaded.model, bool(loaded.frozen)

    def flops(batch: Any) -> float:
        # The policy reads the mismatched answers too, the reference both.
        update = update_flops(model, batch.tokens, frozen=frozen)
        other = work_of(batch.mismatched)
        asked = work_of(batch.tokens).add(other).add(other)
        return update + forward_flops(model.config, asked)

    return updates_task(
        loaded, state, step, batches,
        total=total, flops=flops, evaluate=evaluate, prepare=prepare,
    )  # fmt: skip
