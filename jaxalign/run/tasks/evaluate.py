"""Evaluates a reward model on held-out data, over the scores of all examples at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms import reward
from jaxalign.data import Batches
from jaxalign.models.base import ScalarModel
from jaxalign.parallel.sharding import all_gather_rows, shard_batch
from jaxalign.rewards import evaluation
from jaxalign.rewards.evaluation import EvalResult
from jaxalign.run.metrics import add_up
from jaxalign.types import TrainState


class RewardEvaluator:
    """Evaluates the reward model of a state.

    Args:
      scorer: the reward model.
      config: options of the algorithm.
      batches: held-out data.
      mesh: the state's mesh.
    """

    def __init__(
        self, scorer: ScalarModel, config: reward.Config, batches: Batches[Any], mesh: Mesh
    ):
        self._measure = reward.make_measure(scorer, config)
        self._config = config
        self._batches = batches
        self._mesh = mesh
        self._details: dict[str, Any] = {}

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Metrics of all held-out data: the step's metrics and those of `rewards.evaluation`."""
        sums, parts = [], []
        with jax.set_mesh(self._mesh):
            for batch in self._batches:
                metrics, examples = self._measure(state, shard_batch(batch, self._mesh))
                sums.append(metrics)
                parts.append(all_gather_rows(examples))
        examples = {name: _join([part[name] for part in parts]) for name in parts[0]}
        result = evaluate(self._config, examples, self._batches.sources)
        self._details = {"objective": self._config.objective} | result.details
        return result.figures | add_up(sums)

    def details(self) -> dict[str, Any]:
        """Curves and tables of the last call."""
        return self._details


def evaluate(
    config: reward.Config, examples: dict[str, np.ndarray], sources: Sequence[str]
) -> EvalResult:
    """Evaluates scored examples by the objective's function in `jaxalign.rewards.evaluation`."""
    if config.objective == "pairs":
        return evaluation.evaluate_pairs(examples, sources)
    if config.objective == "ranking":
        return evaluation.evaluate_rankings(examples, sources)
    if config.objective == "regression":
        return evaluation.evaluate_grades(examples, sources, config.attributes)
    return evaluation.evaluate_steps(examples, sources)


def _join(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Concatenates rows of batches of several widths, padded with zeros (False in the mask)."""
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])
