"""DPO: a batch of pairs gets the log-probabilities of the reference, then is one update."""

from __future__ import annotations

import functools
import itertools
from typing import Any

from jax.sharding import Mesh

from jaxalign.algorithms import dpo
from jaxalign.data import preference_batches
from jaxalign.models.flops import forward_flops, update_flops, work_of
from jaxalign.run.config.runs import DPORun
from jaxalign.run.tasks.data import make_data, names_of, total_of
from jaxalign.run.tasks.models import load_policy, reference_model
from jaxalign.run.tasks.reference import hold_reference, keep_reference, reference_optimizer
from jaxalign.run.tasks.task import Task, evaluator, optimizer, start, updates_task


def dpo_task(config: DPORun, mesh: Mesh) -> Task:
    """DPO: a batch of pairs gets the reference's log-probabilities, then is one update."""
    loaded = load_policy(config.model, mesh, config.run.seed)
    load = functools.partial(reference_model, loaded=loaded, config=config.model, mesh=mesh)
    batches, held_out = make_data(preference_batches, config, loaded.tok, mesh)
    total = total_of(config, batches)
    cache = None
    if config.reference_cache is not None:
        every = lambda: itertools.chain(  # noqa: E731
            itertools.islice(batches, total), held_out or ()
        )
        cache = keep_reference(config, loaded, every, load)
    tx = reference_optimizer(optimizer(config.optimizer, total), config.reference_sync)
    micro = config.run.micro_batches
    state, step = start(
        loaded,
        tx,
        dpo.make_step(loaded.model, tx, config.dpo, micro_batches=micro, sources=batches.sources),
        mesh,
    )
    asked = cache is None and config.dpo.has_reference
    if cache is not None:
        prepare = lambda state, batch: cache.fill(batch)  # noqa: E731
    elif config.dpo.has_reference:
        state, reference = hold_reference(config, loaded, state, load)
        add = dpo.make_prepare(reference.model, config.dpo)
        prepare = lambda state, batch: add(reference.params(state), batch)  # noqa: E731
    else:
        prepare = lambda state, batch: batch  # noqa: E731
    loss = dpo.make_loss(loaded.model, config.dpo, sources=names_of(held_out))
    evaluate = evaluator(loss, held_out, mesh, prepare)
    # `flops` lives as long as the task: it must not hold the weights that the state was made of.
    model, frozen = loaded.model, bool(loaded.frozen)

    def flops(batch: Any) -> float:
        update = update_flops(model, batch, frozen=frozen)
        return update + (forward_flops(model.config, work_of(batch)) if asked else 0.0)

    return updates_task(
        loaded, state, step, batches,
        total=total, flops=flops, evaluate=evaluate, prepare=prepare,
    )  # fmt: skip
