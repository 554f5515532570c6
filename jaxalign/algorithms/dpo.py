"""Direct preference optimisation: the preference loss of the policy itself, without a reward model.

    L = − log σ(β · (log π(y_c|x)/π_ref(y_c|x) − log π(y_r|x)/π_ref(y_r|x)))

averaged over pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7); other
forms by `loss_type`, see `losses.dpo`. The frozen reference acts in `prepare`: the step itself
holds one model.

Batch: `PairBatch`, with `ref_*_logps` added by `prepare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.pairs import interleave, pair_mask, pairs_in_row, separate
from jaxalign.algorithms.step import Loss, Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses.dpo import check_options, preference_loss
from jaxalign.masked import masked_sum, segment_sum, weighted
from jaxalign.models.base import LanguageModel
from jaxalign.models.heads import target_logprobs
from jaxalign.sharding import mesh_of, on_mesh, shard_batch
from jaxalign.types import Array, PairBatch, Params, TokenBatch, Weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DPO.

    Attributes:
      beta: β > 0, strength of the leash to the reference (τ in IPO).
      loss_type: see `losses.dpo.preference_loss`.
      label_smoothing: in [0, 0.5): the assumed rate of flipped labels, for the types that use it.
      ipo_normalize: `ipo` only: divide log-ratios by answer length (as TRL).
    """

    beta: float = 0.1
    loss_type: str = "sigmoid"
    label_smoothing: float = 0.0
    ipo_normalize: bool = True

    def __post_init__(self):
        # The loss itself knows which options go together; let it speak before any data is read.
        check_options(
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            ipo_normalize=self.ipo_normalize,
        )

    def loss(
        self,
        chosen_logps: jax.Array,
        rejected_logps: jax.Array,
        ref_chosen_logps: jax.Array,
        ref_rejected_logps: jax.Array,
        chosen_lengths: jax.Array,
        rejected_lengths: jax.Array,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`losses.dpo.preference_loss` with these options."""
        return preference_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            ipo_normalize=self.ipo_normalize,
            chosen_lengths=chosen_lengths,
            rejected_lengths=rejected_lengths,
        )


def pair_logps(
    model: LanguageModel, params: Params, batch: PairBatch
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities of both answers, Σ_t m_t · log π(y_t|·): `[B]` or `[B, S]`."""
    tokens = interleave(batch)
    hidden = model.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
    logprobs = target_logprobs(model, params, hidden, tokens.targets, mask=tokens.loss_mask)
    return separate(_sum_answers(logprobs, tokens, pairs_in_row(batch)))


def _sum_answers(x: jax.Array, tokens: TokenBatch, count: int | None) -> jax.Array:
    if count is None:
        return masked_sum(x, tokens.loss_mask, axis=1)
    answers = jnp.where(jnp.asarray(tokens.loss_mask), tokens.segment_ids, 0)
    return segment_sum(x, answers, count)


def make_prepare(model: LanguageModel) -> Callable[[Params, PairBatch], PairBatch]:
    """Builds `prepare(ref_params, batch) -> batch` with the reference's log-probabilities added.

    The reference may be any parameters of `model`; run it once an epoch, or once and keep the
    result: it never changes.
    """

    @jax.jit
    def logps(ref_params: Params, batch: PairBatch) -> tuple[jax.Array, jax.Array]:
        return pair_logps(model, ref_params, batch)

    def prepare(ref_params: Params, batch: PairBatch) -> PairBatch:
        mesh = mesh_of(ref_params)
        if mesh is not None:
            batch = shard_batch(batch, mesh)
        with on_mesh(mesh):
            chosen, rejected = logps(ref_params, batch)
        return batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    return prepare


def make_loss(model: LanguageModel, config: Config | None = None) -> Loss:
    """The DPO loss, one term `preference` weighted by pairs."""
    config = Config() if config is None else config

    def count(batch: PairBatch) -> dict[str, Array]:
        return {"preference": jnp.sum(pair_mask(batch), dtype=jnp.float32)}

    def terms(params: Params, batch: PairBatch) -> tuple[dict[str, Array], dict[str, Weighted]]:
        if batch.ref_chosen_logps is None or batch.ref_rejected_logps is None:
            raise ValueError(
                "the DPO batch has no ref_chosen_logps / ref_rejected_logps; "
                "add them with dpo.make_prepare(model)(ref_params, batch)"
            )
        chosen, rejected = pair_logps(model, params, batch)
        ones = jnp.ones_like(batch.chosen.inputs, jnp.float32)
        both = pairs_in_row(batch)
        losses, chosen_rewards, rejected_rewards = config.loss(
            chosen,
            rejected,
            jnp.asarray(batch.ref_chosen_logps),
            jnp.asarray(batch.ref_rejected_logps),
            _sum_answers(ones, batch.chosen, both),
            _sum_answers(ones, batch.rejected, both),
        )
        mask = pair_mask(batch)
        values = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
        }
        metrics = {k: weighted(jax.lax.stop_gradient(v), mask) for k, v in values.items()}
        return {"preference": weighted(losses, mask).total}, metrics

    return Loss(count, terms)


def make_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
) -> Step:
    """`step(state, batch: PairBatch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(model, config), tx, micro_batches)
