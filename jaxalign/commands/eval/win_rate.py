"""How often one model's answers beat another's, with and without the effect of their lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.data.examples import Message
from jaxalign.data.rows import to_prompt
from jaxalign.data.sources import read_rows
from jaxalign.run.evaluation.figures import Figure, Measured, share
from jaxalign.run.evaluation.language_model import EvaluatedModel

RESAMPLES = 1000
_STEPS, _FAR = 25, 10.0  # Newton steps; logits beyond ±10 are practically certain


class Verdicts(NamedTuple):
    """A judge's verdicts on pairs of answers.

    Attributes:
      wins: `[N]`, 1 where the first answer is better, ½ where they are equal, 0 else.
      notes: remarks for display.
      details: details of each pair, JSON-able.
    """

    wins: np.ndarray
    notes: Sequence[str]
    details: Sequence[dict[str, Any]]


Judge = Callable[[Sequence[list[Message]], Sequence[str], Sequence[str]], Verdicts]
"""(prompts, first answers, second answers) → verdicts."""


def measure_win_rate(
    model: EvaluatedModel, other: EvaluatedModel, files: Sequence[str], judge: Judge
) -> Measured:
    """How often `model`'s answers are better than `other`'s, by a judge.

    `win_rate` counts a tie as half. `win_rate_length_controlled` comes from `length_controlled`.
    """
    rows = read_rows(list(files))
    rows = rows if model.options.limit is None else rows[: model.options.limit]
    prompts = [list(to_prompt(row).messages) for row in rows]
    answers, others = model.answers(prompts), other.answers(prompts)
    wins, notes, details = judge(prompts, answers, others)
    lengths = [np.array([len(text) for text in texts]) for texts in (answers, others)]
    controlled = length_controlled(wins, lengths[0] - lengths[1], model.options.seed)
    figures = {
        "win_rate": share(wins, "prompts"),
        "win_rate_length_controlled": Figure(*controlled, len(wins), "prompts"),
        "length_ratio": Figure(
            float(lengths[0].mean() / max(lengths[1].mean(), 1)), None, None, len(wins), "prompts"
        ),
    }
    kept = [
        {"origin": row.origin, "answer": a, "other": b, "win": float(win)} | detail
        for row, a, b, win, detail in zip(rows, answers, others, wins, details, strict=True)
    ]
    return Measured(figures, notes, kept)


def length_controlled(
    wins: Sequence[float] | np.ndarray,
    differences: Sequence[float] | np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[float, float, float]:
    """The win rate at equal lengths, by a logistic regression on the difference of lengths.

        P(win) = σ(θ + φ · tanh(Δ / std Δ)),   rate = σ(θ)

    as AlpacaEval 2 does (Dubois et al. 2024, arXiv 2404.04475), without its term for the difficulty
    of each instruction. φ has a penalty of φ²/2, so that with equal lengths the result is the plain
    win rate.

    Args:
      wins: 1, ½ or 0 for each pair, `[N]`.
      differences: Δ, length of the first answer less that of the second, characters, `[N]`.
      seed: seed of the bootstrap.
      resamples: bootstrap resamples for the interval.

    Returns:
      (rate, lower, upper) with the bootstrap's 2.5 and 97.5 % points; (½, 0, 1) for no pair.
    """
    y, delta = np.asarray(wins, np.float64), np.asarray(differences, np.float64)
    if not len(y):
        return 0.5, 0.0, 1.0
    spread = float(delta.std())
    x = np.tanh(delta / spread) if spread > 0 else np.zeros_like(delta)
    rate = float(_rate(x[None], y[None])[0])
    picks = np.random.default_rng(seed).integers(0, len(y), (resamples, len(y)))
    low, high = np.quantile(_rate(x[picks], y[picks]), [0.025, 0.975])
    return rate, float(low), float(high)


def _rate(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """σ(θ) of each row's regression, by Newton's method; `[R, N]` → `[R]`."""
    theta, phi = np.zeros(len(x)), np.zeros(len(x))
    for _ in range(_STEPS):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        weight = p * (1 - p)
        slope_theta, slope_phi = (y - p).sum(1), ((y - p) * x).sum(1) - phi
        a, b, d = weight.sum(1) + 1e-9, (weight * x).sum(1), (weight * x * x).sum(1) + 1.0
        determinant = a * d - b * b
        # The step is bounded, because θ diverges if all pairs are won.
        step_theta = np.clip((d * slope_theta - b * slope_phi) / determinant, -1, 1)
        step_phi = np.clip((a * slope_phi - b * slope_theta) / determinant, -1, 1)
        theta, phi = np.clip(theta + step_theta, -_FAR, _FAR), phi + step_phi
    return _sigmoid(theta)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))
