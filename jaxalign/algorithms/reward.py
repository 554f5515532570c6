"""Reward model: a scalar score for an answer, learned from pairs.

    L = − log σ(r(x, y_chosen) − r(x, y_rejected) − margin)  [+ c · (r_chosen + r_rejected)²]

averaged over pairs (Bradley and Terry 1952; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155,
equation 1; the centring term: Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244). The score
is read at the last token of the sequence.

Batch: `PairBatch`; its reference log-probabilities are not used.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.pairs import interleave, pair_mask, pairs_in_row, separate
from jaxalign.algorithms.step import Loss, Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses.reward import bradley_terry
from jaxalign.masked import keep, weighted
from jaxalign.models.base import ScalarModel
from jaxalign.models.heads import pooled_scores
from jaxalign.types import Array, PairBatch, Params, Weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward modelling.

    Attributes:
      center_coef: c ≥ 0, pulls the mean score of a pair to 0 (TRL: center_rewards_coefficient).
    """

    center_coef: float = 0.0

    def __post_init__(self):
        if self.center_coef < 0:
            raise ValueError(f"reward center_coef={self.center_coef}: wanted 0 or more")


def make_loss(scorer: ScalarModel, config: Config | None = None) -> Loss:
    """The reward-model loss, one term `preference` weighted by pairs."""
    config = Config() if config is None else config

    def count(batch: PairBatch) -> dict[str, Array]:
        return {"preference": jnp.sum(pair_mask(batch), dtype=jnp.float32)}

    def terms(params: Params, batch: PairBatch) -> tuple[dict[str, Array], dict[str, Weighted]]:
        scores = pooled_scores(scorer, params, interleave(batch), pairs_in_row(batch))
        chosen, rejected = separate(scores)
        mask = pair_mask(batch)
        # Masked before the arithmetic: what stands in an empty slot must not reach a gradient.
        chosen, rejected = keep(chosen, mask), keep(rejected, mask)
        margin = None if batch.margin is None else keep(batch.margin, mask)
        losses = bradley_terry(chosen, rejected, margin, config.center_coef)
        chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
        metrics = {
            "accuracy": weighted((chosen > rejected).astype(jnp.float32), mask),
            "margin": weighted(chosen - rejected, mask),
            "scores/chosen": weighted(chosen, mask),
            "scores/rejected": weighted(rejected, mask),
        }
        return {"preference": weighted(losses, mask).total}, metrics

    return Loss(count, terms)


def make_step(
    scorer: ScalarModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
) -> Step:
    """`step(state, batch: PairBatch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(scorer, config), tx, micro_batches)
