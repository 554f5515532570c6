"""Kahneman-Tversky optimisation: single answers, each marked as desirable or not; no pairs.

    L = mean of λ_D (1 − σ(β(s − z)))  over desirable answers,  λ_U (1 − σ(β(z − s)))  over the rest

with s = log π(y|x)/π_ref(y|x) and z an estimate of how far the policy is from the reference
(Ethayarajh et al. 2024, https://arxiv.org/abs/2402.01306, equation 7). z is one number for the
whole batch and has no gradient. `prepare` computes it with the current policy, and adds the frozen
reference's log-probabilities.

Batch: `UnpairedBatch`, with `ref_logps` and `kl` added by `prepare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.by_source import by_source, source_of_rows
from jaxalign.algorithms.loss import Entries, HiddenLoss, Loss, Sums, Terms, with_model_terms
from jaxalign.algorithms.prepare import Prepare
from jaxalign.algorithms.step import Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses.kto import check_options, kl_estimate, kto_loss
from jaxalign.losses.masked import as_bool, keep, masked_sum, weighted
from jaxalign.models.base import LanguageModel, combine, read
from jaxalign.models.lm_head import target_logprobs
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, shard_batch, use_mesh
from jaxalign.types import Params, TokenBatch, TrainState, UnpairedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of KTO.

    Attributes:
      beta: β > 0, how closely the policy is held to the reference.
      desirable_weight: λ_D > 0.
      undesirable_weight: λ_U > 0. The paper recommends λ_D n_D / (λ_U n_U) between 1 and 4/3, with
        n the number of answers of each kind in the data.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self):
        check_options(
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


def hidden_logps(
    model: LanguageModel, params: Params, hidden: jax.Array, tokens: TokenBatch
) -> jax.Array:
    """Summed log-probability of each row's answer, float32 `[B]`, from hidden states."""
    logprobs = target_logprobs(model, params, hidden, tokens.targets, mask=tokens.loss_mask)
    return masked_sum(logprobs, tokens.loss_mask, axis=1)


def answer_logps(model: LanguageModel, params: Params, tokens: TokenBatch) -> jax.Array:
    """Summed log-probability of each row's answer, float32 `[B]`."""
    hidden, _ = read(model, params, tokens)
    return hidden_logps(model, params, hidden, tokens)


def make_prepare(
    model: LanguageModel, reference: LanguageModel | None = None
) -> Prepare[[TrainState, Params, UnpairedBatch], UnpairedBatch]:
    """Builds `prepare(state, ref_params, batch) -> batch` with `ref_logps` and `kl` added.

    The estimate is over the whole batch, even if the step splits it. It takes one more forward pass
    of the policy, without a gradient. The policy moves, so run `prepare` on every batch.

    Args:
      model: the policy.
      reference: the model of `ref_params`; None: the policy's model.
    """
    reference = model if reference is None else reference

    @jax.jit
    def compare(
        policy: Params, ref_params: Params, batch: UnpairedBatch
    ) -> tuple[jax.Array, jax.Array]:
        ref_params = on_device(ref_params)
        exists = jnp.any(as_bool(batch.mismatched.loss_mask), axis=1)
        kl = kl_estimate(
            answer_logps(model, policy, batch.mismatched),
            answer_logps(reference, ref_params, batch.mismatched),
            exists,
        )
        return answer_logps(reference, ref_params, batch.tokens), jnp.full(exists.shape, kl)

    def prepare(state: TrainState, ref_params: Params, batch: UnpairedBatch) -> UnpairedBatch:
        mesh = mesh_of(ref_params)
        if mesh is not None:
            batch = shard_batch(batch, mesh)
        with use_mesh(mesh):
            logps, kl = compare(combine(state.params, state.frozen), ref_params, batch)
        return batch._replace(ref_logps=logps, kl=kl)

    def lower(state: TrainState, ref_params: Params, batch: UnpairedBatch) -> jax.stages.Lowered:
        with use_mesh(mesh_of(ref_params)):
            return compare.lower(combine(state.params, state.frozen), ref_params, batch)

    return Prepare(prepare, lower, ("state", "ref_params", "batch"))


def make_loss(
    model: LanguageModel, config: Config | None = None, *, sources: Sequence[str] = ()
) -> Loss:
    """The KTO loss: `kto`, averaged over answers.

    With several `sources` (the names for the rows' `source_ids`), it also logs `kto/<source>`.
    """
    config = Config() if config is None else config

    def exists(batch: UnpairedBatch) -> jax.Array:
        return jnp.any(as_bool(batch.tokens.loss_mask), axis=1)

    def count(batch: UnpairedBatch) -> Sums:
        return {"kto": jnp.sum(exists(batch), dtype=jnp.float32)}

    def terms(params: Params, hidden: jax.Array, batch: UnpairedBatch) -> Terms:
        if batch.ref_logps is None or batch.kl is None:
            raise ValueError(
                "the KTO batch has no ref_logps / kl; add them with "
                "kto.make_prepare(model)(state, ref_params, batch)"
            )
        mask = exists(batch)
        logps = hidden_logps(model, params, hidden, batch.tokens)
        kl = keep(batch.kl, mask)
        losses, rewards = kto_loss(
            logps,
            keep(batch.ref_logps, mask),
            batch.desirable,
            kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        good = mask & as_bool(batch.desirable)
        bad = mask & ~as_bool(batch.desirable)
        metrics = {
            "rewards/chosen": weighted(rewards, good),
            "rewards/rejected": weighted(rewards, bad),
            "logps/chosen": weighted(logps, good),
            "logps/rejected": weighted(logps, bad),
            "kl": weighted(kl, mask),
        }
        source = source_of_rows(batch.tokens)
        return Terms(
            {"kto": weighted(losses, mask).total}, metrics, Entries("kto", losses, mask, source)
        )

    loss = HiddenLoss(lambda batch: batch.tokens, count, terms)
    return with_model_terms(by_source(loss, sources), model)


def make_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
    sources: Sequence[str] = (),
) -> Step:
    """`step(state, batch: UnpairedBatch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(model, config, sources=sources), tx, micro_batches)
