"""Combines several rewards into their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.parallel.sharding import local_rows, mesh_of
from jaxalign.rewards.cases import RewardError
from jaxalign.rewards.text import scores_of
from jaxalign.types import PromptBatch, Scores, TokenBatch

if TYPE_CHECKING:
    from jaxalign.sampling.stream import Watch


def combine_rewards(
    rewards: Mapping[str, Callable[[TokenBatch, PromptBatch], Any]],
    weights: Mapping[str, float] | None = None,
) -> Callable[[TokenBatch, PromptBatch], Scores]:
    """The weighted sum of several rewards.

        r = Σ_i w_i r_i

    Each r_i is logged as `rewards/<name>`. A text reward may return None for an answer that it does
    not apply to, as in TRL (for data sets with several tasks). It is then left out of that answer's
    sum, and `applies/<name>` logs the share of answers that it scored. Every answer needs a reward
    with a weight other than 0, and every score must be finite.

    Args:
      rewards: name → reward function.
      weights: name → weight, a finite number; default 1. 0 only logs.

    Returns:
      A reward function that returns `Scores` with all parts.

    Raises:
      ValueError: no rewards, a weight with an unknown name, a weight that is not finite, or only
        zero weights.
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
        # Dispatch all rewards before reading any: models run on devices while functions run in
        # Python.
        dispatched = {
            name: scores_of(reward, tokens, prompts, name) for name, reward in rewards.items()
        }
        mesh = mesh_of((tokens, prompts))
        answered: Any = np.asarray(local_rows(tokens.loss_mask, mesh)).any(axis=1)
        index = np.asarray(local_rows(prompts.index, mesh))
        parts = {
            name: _check_scores(local_rows(scores, mesh), answered, index, name)
            for name, scores in dispatched.items()
        }
        total = np.zeros(len(answered), np.float64)
        scored = np.zeros(len(answered), np.bool_)
        for name, part in parts.items():
            total += factors[name] * part.values  # 0 where the reward does not apply
            if factors[name]:
                scored |= np.asarray(part.applies)
        unscored = np.flatnonzero(answered & ~scored)
        if unscored.size:
            raise RewardError(
                f"no reward of {', '.join(rewards)} applies to {_row(unscored[0], index)} "
                f"({unscored.size} such rows); every answer needs one whose weight is not 0"
            )
        return Scores(total.astype(np.float32), answered, parts)

    def early_watch(prompts: PromptBatch, name: str | None = None) -> Watch | None:
        # A reward under two names keeps one set of early scores.
        different = {id(reward): (own, reward) for own, reward in rewards.items()}
        found = [
            reward.early_watch(prompts, own)  # pyrefly: ignore[missing-attribute]
            for own, reward in different.values()
            if getattr(reward, "early_watch", None) is not None
        ]
        watches = [watch for watch in found if watch is not None]
        if not watches:
            return None

        def watch(tokens: np.ndarray, counts: np.ndarray) -> None:
            for each in watches:
                each(tokens, counts)

        return watch

    reward.early_watch = early_watch  # pyrefly: ignore[missing-attribute]
    return reward


def _check_scores(result: Any, answered: np.ndarray, index: np.ndarray, name: str) -> Scores:
    """Checks that one reward's scores are finite; sets those that do not apply to 0."""
    scores = result if isinstance(result, Scores) else Scores(result)
    values = np.asarray(scores.values, np.float32)
    if values.shape != answered.shape:
        raise RewardError(
            f"reward {name!r} gave shape {values.shape}, wanted one score a row {answered.shape}"
        )
    applies = answered if scores.applies is None else answered & np.asarray(scores.applies)
    bad = np.flatnonzero(applies & ~np.isfinite(values))
    if bad.size:
        raise RewardError(
            f"reward {name!r} gave {values[bad[0]]} for {_row(bad[0], index)} ({bad.size} such "
            "rows); wanted finite numbers"
        )
    return Scores(np.where(applies, values, np.float32(0)), applies)


def _row(place: int, index: np.ndarray) -> str:
    return f"row {place} of the batch (row {index[place]} of the data)"
