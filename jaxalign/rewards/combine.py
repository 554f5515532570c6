"""Several rewards as one: their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxalign.parallel.sharding import local_rows, mesh_of
from jaxalign.rewards.cases import RewardError
from jaxalign.rewards.text import scores_of
from jaxalign.types import PromptBatch, Scores, TokenBatch


def combine_rewards(
    rewards: Mapping[str, Callable[[TokenBatch, PromptBatch], Any]],
    weights: Mapping[str, float] | None = None,
) -> Callable[[TokenBatch, PromptBatch], Scores]:
    """The weighted sum Σ w_i r_i of several rewards, each of which is logged as `rewards/<name>`.

    A text reward may give None for a row that it does not apply to (a data set of several tasks,
    as in TRL): it is then left out of the sum, and `applies/<name>` says for what part of the
    answers it spoke. An answer that no reward of a weight other than 0 applies to is an error, and
    so is a score that is no finite number.

    Args:
      rewards: name → reward function.
      weights: name → weight, any finite number; 1 where not named. 0 only logs.

    Returns:
      A reward function that gives `Scores` with all parts.

    Raises:
      ValueError: no rewards, a weight of an unknown name or that is not finite, or all are 0.
    """
    if not rewards:
        raise ValueError("rewards: got none, wanted at least one, by name")
    unknown = set(weights or ()) - set(rewards)
    if unknown:
        raise ValueError(
            f"weights of {', '.join(sorted(unknown))}: no such reward; known: {', '.join(rewards)}"
        )
    factors = dict.fromkeys(rewards, 1.0) | dict(weights or {})
    wrong = {name: weight for name, weight in factors.items() if not math.isfinite(weight)}
    if wrong or not any(factors.values()):
        raise ValueError(f"weights={factors}: wanted finite numbers, of which one is not 0")

    def reward(tokens: TokenBatch, prompts: PromptBatch) -> Scores:
        # All are asked before any is waited for: models compute while functions run.
        said = {name: scores_of(each, tokens, prompts, name) for name, each in rewards.items()}
        mesh = mesh_of((tokens, prompts))
        answered: Any = np.asarray(local_rows(tokens.loss_mask, mesh)).any(axis=1)
        index = np.asarray(local_rows(prompts.index, mesh))
        said = {name: local_rows(each, mesh) for name, each in said.items()}
        parts = {name: _checked(each, answered, index, name) for name, each in said.items()}
        total = np.zeros(len(answered), np.float64)
        spoken = np.zeros(len(answered), np.bool_)
        for name, part in parts.items():
            # Where one does not apply, its value is 0.
            total += factors[name] * part.values
            if factors[name]:
                spoken |= np.asarray(part.applies)
        silent = np.flatnonzero(answered & ~spoken)
        if silent.size:
            raise RewardError(
                f"no reward of {', '.join(rewards)} applies to {_row(silent[0], index)} "
                f"({silent.size} such rows); every answer needs one whose weight is not 0"
            )
        return Scores(total.astype(np.float32), answered, parts)

    return reward


def _checked(said: Any, answered: np.ndarray, index: np.ndarray, name: str) -> Scores:
    """One reward's scores on the host, finite, 0 where they do not count."""
    given = said if isinstance(said, Scores) else Scores(said)
    values = np.asarray(given.values, np.float32)
    if values.shape != answered.shape:
        raise RewardError(
            f"reward {name!r} gave shape {values.shape}, wanted one score a row {answered.shape}"
        )
    applies = answered if given.applies is None else answered & np.asarray(given.applies)
    bad = np.flatnonzero(applies & ~np.isfinite(values))
    if bad.size:
        raise RewardError(
            f"reward {name!r} gave {values[bad[0]]} for {_row(bad[0], index)} ({bad.size} such "
            "rows); wanted finite numbers"
        )
    return Scores(np.where(applies, values, np.float32(0)), applies)


def _row(place: int, index: np.ndarray) -> str:
    return f"row {place} of the batch (row {index[place]} of the data)"
