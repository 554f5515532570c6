"""DPO: the reference adds log-probabilities to a batch of pairs, which is then one update."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.algorithms import dpo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.pairs import pair_mask
from jaxalign.models.flops import work_of
from jaxalign.run.config.dpo import DPORun
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import Policy, load_policy
from jaxalign.run.tasks.parts import (
    BatchPrepare,
    Parts,
    RunData,
    no_work,
    scheduled_optimizer,
    with_guard,
)
from jaxalign.run.tasks.reference import (
    Reference,
    cached_reference,
    make_reference,
    reference_optimizer,
)
from jaxalign.run.tasks.reference_cache import ReferenceCache
from jaxalign.run.tasks.shapes import array
from jaxalign.types import TrainState


def build_dpo(
    config: DPORun, mesh: Mesh, loader: Loader, data: RunData
) -> tuple[TrainState, Parts]:
    """The parts of a DPO run; its reference is in memory, moving, cached or absent."""
    policy = load_policy(config, mesh, loader, data.tok)
    prepare = reference = None
    if config.reference_cache is not None:
        # Before the train state, because both might not fit at the same time.
        prepare = _from_cache(_cache(config, policy, mesh, loader, data))
    tx = with_guard(scheduled_optimizer(config.optimizer, data.total), config.run)
    tx = reference_optimizer(tx, config.reference_sync)
    step = dpo.make_step(
        policy.model,
        tx,
        config.dpo,
        micro_batches=config.run.micro_batches,
        sources=data.sources,
    )
    state = loader.init_state(policy.params, tx, policy.frozen)
    if config.dpo.has_reference and prepare is None:
        state, reference = make_reference(config, policy, state, mesh, loader, data.tok)
        prepare = _from_reference(reference, config.dpo)
    return state, Parts(
        policy=policy.model,
        adapted=bool(policy.frozen),
        step=compile_step(step, state, mesh),
        loss=dpo.make_loss(policy.model, config.dpo, sources=data.held_out_sources),
        prepare=prepare,
        reference=reference,
        prepare_work=no_work if reference is None else work_of,
    )


def _from_reference(reference: Reference, config: dpo.Config) -> BatchPrepare:
    prepare = dpo.make_prepare(reference.model, config)
    return BatchPrepare(
        run=lambda state, batch: prepare(reference.params(state), batch),
        shapes=_with_logps,
        lower=lambda state, batch: prepare.lower(reference.params(state), batch),
    )


def _from_cache(cache: ReferenceCache) -> BatchPrepare:
    return BatchPrepare(run=lambda state, batch: cache.fill(batch), shapes=_with_logps, lower=None)


def _with_logps(batch: Any) -> Any:
    """Pairs as shapes, with the reference's log-probabilities of each: `[B]`, or `[B, S]`."""
    logps = array(*jax.eval_shape(pair_mask, batch).shape)
    return batch._replace(ref_chosen_logps=logps, ref_rejected_logps=logps)


def _cache(
    config: DPORun, policy: Policy, mesh: Mesh, loader: Loader, data: RunData
) -> ReferenceCache:
    if data.batches is None:
        return ReferenceCache()  # nothing will be run
    training = data.batches

    def batches() -> Iterator[Any]:
        """All batches of the run, including held-out ones."""
        return itertools.chain(itertools.islice(training, data.total), data.held_out or ())

    return cached_reference(config, policy, batches, mesh, loader, data.tok)
