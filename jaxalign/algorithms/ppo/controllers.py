"""PPO's state between iterations, apart from weights: KL coefficient and score statistics.

They are plain numbers, which a checkpoint stores as JSON.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.ppo.config import Config
from jaxalign.losses.ppo import adaptive_kl_coef, missing_eos_penalty
from jaxalign.parallel.sharding import all_gather_rows
from jaxalign.sampling.generate import Generation
from jaxalign.types import Array, RolloutBatch


class ScoreStats(NamedTuple):
    """Mean and spread of all scores seen so far, in float64.

    Attributes:
      count: how many scores.
      mean: their mean.
      squares: Σ (score − mean)².
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        """Biased standard deviation; 1 while there is no spread, so that it can be a divisor."""
        spread = math.sqrt(self.squares / self.count) if self.count else 0.0
        return spread if spread > 0 else 1.0

    def add(self, scores: Array, valid: Array) -> ScoreStats:
        """The statistics updated with the valid `scores` `[B]`: Chan et al. 1983, equation 2.1."""
        scores, valid = all_gather_rows((scores, valid))
        added = np.asarray(scores, np.float64)[np.asarray(valid, bool)]
        if not added.size:
            return self
        count, gap = self.count + added.size, float(added.mean()) - self.mean
        squares = self.squares + float(np.square(added - added.mean()).sum())
        return ScoreStats(
            count,
            self.mean + gap * added.size / count,
            squares + gap * gap * self.count * added.size / count,
        )


def next_score_stats(stats: ScoreStats, rollout: RolloutBatch) -> ScoreStats:
    """The statistics including this rollout's scores, as `prepare` used them to normalise it."""
    if rollout.scores is None or rollout.valid is None:
        raise ValueError("the rollout lacks scores; wanted one that make_prepare made")
    return stats.add(rollout.scores, rollout.valid)


def running_scale(
    scores: Array, answers: Generation, penalty: float, stats: ScoreStats | None
) -> tuple[np.float32, np.float32]:
    """(mean, standard deviation) of all scores so far, including these, after penalties."""
    answered = jnp.any(answers.mask, axis=1)
    penalised = missing_eos_penalty(scores, answers.finished, penalty)
    stats = (ScoreStats() if stats is None else stats).add(penalised, answered)
    return np.float32(stats.mean), np.float32(stats.std)


def next_kl_coef(kl_coef: float, measured_kl: float, config: Config, rows: int) -> float:
    """β for the next iteration: unchanged, or adapted towards `kl_target`."""
    if config.kl_target is None:
        return kl_coef
    return float(
        adaptive_kl_coef(
            kl_coef,
            measured_kl,
            target=config.kl_target,
            horizon=config.kl_horizon,
            batch_size=rows,
        )
    )
