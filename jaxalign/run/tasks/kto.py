"""KTO: policy and reference add log-probabilities to a batch of answers, then one update."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.algorithms import kto
from jaxalign.algorithms.compile import compile_step
from jaxalign.models.flops import Work, work_of
from jaxalign.run.config.base import Run
from jaxalign.run.config.kto import KTORun
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import load_policy
from jaxalign.run.tasks.parts import BatchPrepare, Parts, RunData, scheduled_optimizer, with_guard
from jaxalign.run.tasks.reference import Reference, make_reference, reference_optimizer
from jaxalign.run.tasks.shapes import array, token_shapes
from jaxalign.types import TrainState, UnpairedBatch


def unpaired_shapes(config: Run) -> UnpairedBatch:
    """A batch of answers as shapes."""
    tokens = token_shapes(config.data)
    return UnpairedBatch(tokens, array(config.data.rows, dtype=jnp.bool_), tokens)


def build_kto(
    config: KTORun, mesh: Mesh, loader: Loader, data: RunData
) -> tuple[TrainState, Parts]:
    """The parts of a KTO run; its reference is in memory or moving."""
    policy = load_policy(config, mesh, loader, data.tok)
    tx = with_guard(scheduled_optimizer(config.optimizer, data.total), config.run)
    tx = reference_optimizer(tx, config.reference_sync)
    step = kto.make_step(
        policy.model,
        tx,
        config.kto,
        micro_batches=config.run.micro_batches,
        sources=data.sources,
    )
    state = loader.init_state(policy.params, tx, policy.frozen)
    state, reference = make_reference(config, policy, state, mesh, loader, data.tok)
    return state, Parts(
        policy=policy.model,
        adapted=bool(policy.frozen),
        step=compile_step(step, state, mesh),
        loss=kto.make_loss(policy.model, config.kto, sources=data.held_out_sources),
        prepare=_from_reference(policy.model, reference),
        reference=reference,
        update_work=_update_work,
        prepare_work=_prepare_work,
    )


def _from_reference(policy: Any, reference: Reference) -> BatchPrepare:
    prepare = kto.make_prepare(policy, reference.model)
    return BatchPrepare(
        run=lambda state, batch: prepare(state, reference.params(state), batch),
        shapes=_with_logps,
        lower=lambda state, batch: prepare.lower(state, reference.params(state), batch),
    )


def _with_logps(batch: UnpairedBatch) -> UnpairedBatch:
    """Answers as shapes, with the reference's log-probabilities and the KL: `[B]`."""
    rows = array(*batch.desirable.shape)
    return batch._replace(ref_logps=rows, kl=rows)


def _update_work(batch: UnpairedBatch) -> Work:
    return work_of(batch.tokens)


def _prepare_work(batch: UnpairedBatch) -> Work:
    """The policy reads the mismatched answers, the reference both kinds."""
    mismatched = work_of(batch.mismatched)
    return work_of(batch.tokens).add(mismatched).add(mismatched)
