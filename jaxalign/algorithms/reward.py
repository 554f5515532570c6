"""Reward model: a score for an answer, learned from people's judgements.

There are four objectives, by the kind of judgement (the mathematics is in `jaxalign.losses`):

| objective | batch | loss | averaged over |
| --- | --- | --- | --- |
| "pairs" | `PairBatch`, `SharedPairBatch` | − log σ(r_chosen − r_rejected − margin) | pairs |
| "ranking" | `RankedBatch` | Plackett–Luce, or the mean over all pairs | prompts |
| "regression" | `GradedBatch` | (r − grade)², one output per attribute | grades |
| "steps" | `StepBatch` | binary cross-entropy at the end of each step | steps |

Pairs: Bradley and Terry 1952; Ouyang et al. 2022 (https://arxiv.org/abs/2203.02155), equation 1,
which is also the mean over all pairs of a ranking. The centring term c · (r_chosen + r_rejected)²:
Eisenstein et al. 2023 (https://arxiv.org/abs/2312.09244). Regression: Wang et al. 2023 (HelpSteer,
https://arxiv.org/abs/2311.09528). Steps: Lightman et al. 2023 (https://arxiv.org/abs/2305.20050).

The score is read at the last token of the sequence, or of each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxalign.algorithms import objectives
from jaxalign.algorithms.by_source import by_source
from jaxalign.algorithms.loss import Figures, Loss, run_model, with_model_terms
from jaxalign.algorithms.objectives import Examples, Objective
from jaxalign.algorithms.step import Step, loss_figures
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.models.base import ScalarModel, combine
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.sharding import constrain
from jaxalign.types import TrainState

OBJECTIVES = ("pairs", "ranking", "regression", "steps")
RANKINGS = ("plackett_luce", "all_pairs")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of reward modelling.

    Attributes:
      objective: the kind of judgements to learn from, one of `OBJECTIVES`.
      center_coef: c ≥ 0, pulls the mean score of a pair to 0 (TRL: center_rewards_coefficient).
        Only for pairs, and for all pairs of a ranking.
      label_smoothing: ε, 0 ≤ ε < ½, the assumed fraction of flipped labels. Only for pairs, and for
        all pairs of a ranking.
      ranking: the loss of a ranking, one of `RANKINGS`.
      attributes: for a regression: the names of the grades, in the order of the head's outputs.
    """

    objective: str = "pairs"
    center_coef: float = 0.0
    label_smoothing: float = 0.0
    ranking: str = "plackett_luce"
    attributes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"reward objective={self.objective!r}: wanted one of {', '.join(OBJECTIVES)}"
            )
        if self.ranking not in RANKINGS:
            raise ValueError(
                f"reward ranking={self.ranking!r}: wanted one of {', '.join(RANKINGS)}"
            )
        if self.center_coef < 0:
            raise ValueError(f"reward center_coef={self.center_coef}: wanted 0 or more")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"reward label_smoothing={self.label_smoothing}: wanted 0 or more, below 0.5"
            )
        if self.objective != "ranking" and self.ranking != "plackett_luce":
            raise ValueError(f"reward ranking={self.ranking!r}: wanted objective=ranking with it")
        in_pairs = self.objective == "pairs" or self.ranking == "all_pairs"
        for name in ("center_coef", "label_smoothing"):
            if getattr(self, name) and not in_pairs:
                raise ValueError(
                    f"reward {name}={getattr(self, name)}: objective={self.objective} has no use "
                    "for it; wanted 0, or objective=pairs, or ranking=all_pairs"
                )
        if (self.objective == "regression") != bool(self.attributes):
            raise ValueError(
                f"reward attributes={list(self.attributes)} with objective={self.objective}: "
                "wanted the names of the grades for a regression, and none otherwise"
            )
        if len(set(self.attributes)) < len(self.attributes):
            raise ValueError(f"reward attributes={list(self.attributes)}: wanted each name once")


def make_loss(
    scorer: ScalarModel, config: Config | None = None, *, sources: Sequence[str] = ()
) -> Loss:
    """The loss of the configured objective.

    Its term is `preference` (pairs, ranking), `mse` (regression) or `steps`. With several `sources`
    (the names for the rows' `source_ids`), also that term for each source.

    Raises:
      ValueError: a regression with a scorer whose attributes differ from the config's.
    """
    objective = _objective(scorer, Config() if config is None else config)
    return with_model_terms(by_source(objective.loss, sources), scorer)


def make_measure(
    scorer: ScalarModel, config: Config | None = None
) -> Callable[[TrainState, Any], tuple[Figures, Examples]]:
    """Builds `measure(state, batch) -> ({metric: Weighted}, examples)`, jitted, for held-out data.

    Metrics are those of `algorithms.step.make_eval`, to be added up over batches. Examples are the
    scores and the labels they are compared with; `jaxalign.rewards.evaluation` computes intervals,
    calibration and histograms from them. On a mesh every device holds all examples.
    """
    objective = _objective(scorer, Config() if config is None else config)
    run = run_model(objective.loss, scorer)
    count = with_model_terms(objective.loss, scorer).count

    @jax.jit
    def measure(state: TrainState, batch: Any) -> tuple[Figures, Examples]:
        terms = run(combine(state.params, state.frozen), batch)
        metrics = terms.metrics | loss_figures(terms.sums, count(batch))
        examples = objective.examples(terms.outputs, batch)
        return metrics, {name: constrain(value, "") for name, value in examples.items()}

    return measure


def make_step(
    scorer: ScalarModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
    sources: Sequence[str] = (),
) -> Step:
    """`step(state, batch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(scorer, config, sources=sources), tx, micro_batches)


def _objective(scorer: ScalarModel, config: Config) -> Objective:
    if config.objective == "regression":
        if not isinstance(scorer, Scorer) or scorer.attributes != config.attributes:
            has = getattr(scorer, "attributes", ())
            raise ValueError(
                f"reward attributes={list(config.attributes)}: the scorer has {list(has)}; wanted "
                "the same names in the same order (with_scalar_head(…, attributes=…))"
            )
        return objectives.regression(scorer)
    if config.objective == "steps":
        return objectives.steps(scorer)
    center, smoothing = config.center_coef, config.label_smoothing
    if config.objective == "ranking":
        return objectives.ranking(scorer, config.ranking, center, smoothing)
    return objectives.pairs(scorer, center, smoothing)
