"""Supervised fine-tuning: every batch of conversations is one update."""

from __future__ import annotations

from jax.sharding import Mesh

from jaxalign.algorithms import sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.run.config.sft import SFTRun
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import load_policy
from jaxalign.run.tasks.parts import Parts, RunData, scheduled_optimizer, with_guard
from jaxalign.run.tasks.streams import Stream
from jaxalign.types import TrainState


def build_sft(
    config: SFTRun, mesh: Mesh, loader: Loader, data: RunData
) -> tuple[TrainState, Parts]:
    """The parts of an SFT run."""
    policy = load_policy(config, mesh, loader, data.tok)
    tx = with_guard(scheduled_optimizer(config.optimizer, data.total), config.run)
    step = sft.make_step(
        policy.model,
        tx,
        config.sft,
        micro_batches=config.run.micro_batches,
        sources=data.sources,
    )
    state = loader.init_state(policy.params, tx, policy.frozen)
    seed = (config.run.seed, int(Stream.NEFTUNE))
    noisy = config.sft.neftune_alpha is not None
    return state, Parts(
        policy=policy.model,
        adapted=bool(policy.frozen),
        step=compile_step(step, state, mesh),
        loss=sft.make_loss(policy.model, config.sft, sources=data.held_out_sources),
        perturb=(lambda b, n: sft.add_noise(b, config.sft, (*seed, n))) if noisy else None,
    )
