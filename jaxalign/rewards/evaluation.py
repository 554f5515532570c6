"""How good a reward model is on held-out data: intervals, calibration, histograms, by source.

Plain numpy on the host, over the scores of all held-out examples at once. Each function gives
`EvalResult`: figures for `metrics.jsonl`, and details (curves and tables) for `evaluation.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Z95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""

BINS = 10
_SCORE_BINS = 30


class EvalResult(NamedTuple):
    """What held-out data says.

    Attributes:
      figures: name → number, for `metrics.jsonl`.
      details: JSON-able curves and tables, for `evaluation.json` and the report.
    """

    figures: dict[str, float]
    details: dict[str, Any]


def wilson(wins: float, count: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share of independent trials (Wilson 1927, eq. 4).

    (p + z²/2n ± z · √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),  p = wins/n

    Args:
      wins: how many trials succeeded, 0 to `count`.
      count: n, how many there were.
      z: of the confidence; `Z95` for 95 %.

    Returns:
      (lower, upper) end, in [0, 1]; (0, 1) without any trial.
    """
    if count == 0:
        return 0.0, 1.0
    share, square = wins / count, z * z
    middle = share + square / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + square / (4 * count * count))
    scale = 1 + square / count
    return max(0.0, float((middle - half) / scale)), min(1.0, float((middle + half) / scale))


def calibration(
    predicted: np.ndarray, happened: np.ndarray, low: float = 0.0, bins: int = BINS
) -> tuple[float, list[dict[str, float]]]:
    """Predicted probabilities against how often it happened, in bins of equal width.

    ECE = Σ_b n_b/n · |frequency_b − mean prediction_b|

    the expected calibration error of Guo et al. 2017 (arXiv 1706.04599), eq. 3.

    Args:
      predicted: probabilities in [low, 1], `[N]`.
      happened: 0, 1 or what lies between, `[N]`.
      low: where the first bin begins.
      bins: how many there are up to 1; a probability on an edge belongs to the bin above it.

    Returns:
      (ECE, bins that are not empty): `from`, `to`, `count`, mean `predicted`, mean `observed`, and
      the Wilson interval of the latter, `low` and `high`. ECE is 0 without examples.
    """
    edges = np.linspace(low, 1.0, bins + 1)
    which = np.clip(np.searchsorted(edges, predicted, side="right") - 1, 0, bins - 1)
    table, error = [], 0.0
    for number in range(bins):
        inside = which == number
        count = int(inside.sum())
        if not count:
            continue
        mean, frequency = float(predicted[inside].mean()), float(happened[inside].mean())
        error += count / len(predicted) * abs(frequency - mean)
        ends = wilson(frequency * count, count)
        table.append(
            {
                "from": float(edges[number]),
                "to": float(edges[number + 1]),
                "count": count,
                "predicted": mean,
                "observed": frequency,
                "low": ends[0],
                "high": ends[1],
            }
        )
    return error, table


def histogram(groups: Mapping[str, np.ndarray], bins: int = _SCORE_BINS) -> dict[str, Any]:
    """Counts of each group's values in common bins: `edges` (one more than counts), `counts`."""
    values = np.concatenate([np.ravel(value) for value in groups.values()])
    edges = np.histogram_bin_edges(values, bins) if values.size else np.array([0.0, 1.0])
    counts = {name: np.histogram(value, edges)[0].tolist() for name, value in groups.items()}
    return {"edges": edges.tolist(), "counts": counts}


def evaluate_pairs(examples: Mapping[str, np.ndarray], sources: Sequence[str]) -> EvalResult:
    """Of pairs: accuracy with its interval, calibration of win probabilities, scores.

    The probability is σ(|r_chosen − r_rejected|) that the answer with the higher score wins, from
    ½ to 1, and what happened is whether it was the chosen one (½ where the scores are equal).

    Args:
      examples: `chosen`, `rejected`, `mask` and perhaps `source`, of one shape.
      sources: names of the sources, in the order of their ids.
    """
    mask = examples["mask"]
    chosen, rejected = (examples[side][mask].astype(np.float64) for side in ("chosen", "rejected"))
    figures = _share("accuracy", chosen > rejected)
    gap = chosen - rejected
    figures["ece"], curve = calibration(_sigmoid(np.abs(gap)), (np.sign(gap) + 1) / 2, low=0.5)
    details = {
        "calibration": curve,
        "histogram": histogram({"chosen": chosen, "rejected": rejected}),
    }
    return _with_sources(
        EvalResult(figures, details),
        examples,
        sources,
        lambda one: _share("accuracy", one["chosen"][one["mask"]] > one["rejected"][one["mask"]]),
    )


def evaluate_rankings(examples: Mapping[str, np.ndarray], sources: Sequence[str]) -> EvalResult:
    """Of rankings: how often the best answer scores highest, with its interval; scores by rank.

    Prompts are independent, the pairs of one prompt are not: the interval is of prompts.

    Args:
      examples: `scores`, `ranks`, `mask` `[N, K]`; `best` (1 where the best answer scores highest)
        and `says` (where an order is given at all) `[N]`; perhaps `source` `[N]`.
      sources: names of the sources, in the order of their ids.
    """

    def best(one: Mapping[str, np.ndarray]) -> dict[str, float]:
        return _share("best", one["best"][one["says"]] > 0)

    scores, ranks, mask = (examples[name] for name in ("scores", "ranks", "mask"))
    top = np.max(np.where(mask, ranks, -np.inf), axis=1, keepdims=True, initial=-np.inf)
    chosen = mask & (ranks == top)
    groups = {"best": scores[chosen], "others": scores[mask & ~chosen]}
    details = {"histogram": histogram(groups)}
    return _with_sources(EvalResult(best(examples), details), examples, sources, best)


def evaluate_grades(
    examples: Mapping[str, np.ndarray], sources: Sequence[str], attributes: Sequence[str]
) -> EvalResult:
    """Of grades: the correlation of prediction and grade, for each attribute.

    Args:
      examples: `scores`, `grades`, `mask` `[N, A]`; perhaps `source` `[N]`.
      sources: names of the sources, in the order of their ids.
      attributes: names of the columns.
    """

    def columns(one: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        pairs = zip(one["scores"].T, one["grades"].T, one["mask"].T, strict=True)
        return [
            (score[given].astype(np.float64), grade[given].astype(np.float64))
            for score, grade, given in pairs
        ]

    def by_source(one: Mapping[str, np.ndarray]) -> dict[str, float]:
        errors = np.concatenate([np.square(score - grade) for score, grade in columns(one)])
        return {"mse": float(errors.mean()) if errors.size else 0.0, "count": len(errors)}

    found, figures = columns(examples), {}
    for name, (score, grade) in zip(attributes, found, strict=True):
        figures[f"pearson/{name}"] = _pearson(score, grade)
    table = [
        {
            "attribute": name,
            "count": len(grade),
            "mse": float(np.square(score - grade).mean()) if len(grade) else 0.0,
            "variance": float(np.var(grade)) if len(grade) else 0.0,
            "pearson": figures[f"pearson/{name}"],
        }
        for name, (score, grade) in zip(attributes, found, strict=True)
    ]
    named = dict(zip(attributes, (score for score, _ in found), strict=True))
    details = {"attributes": table, "histogram": histogram(named)}
    return _with_sources(EvalResult(figures, details), examples, sources, by_source)


def evaluate_steps(examples: Mapping[str, np.ndarray], sources: Sequence[str]) -> EvalResult:
    """Of steps: accuracy and F1 at probability ½, and calibration of the probabilities.

    A label of ½ or more counts as right. F1 = 2·TP/(2·TP + FP + FN), of the right steps and of the
    wrong ones: where few steps are wrong, finding those is the harder part. Steps of one answer
    are not independent: the interval is somewhat too narrow.

    Args:
      examples: `scores`, `labels`, `mask` and perhaps `source`, `[N, T]`.
      sources: names of the sources, in the order of their ids.
    """

    def said(one: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return one["scores"][one["mask"]] > 0, one["labels"][one["mask"]] >= 0.5

    def by_source(one: Mapping[str, np.ndarray]) -> dict[str, float]:
        predicted, right = said(one)
        return _share("accuracy", predicted == right)

    mask = examples["mask"]
    scores, labels = (examples[name][mask].astype(np.float64) for name in ("scores", "labels"))
    predicted, right = said(examples)
    figures = _share("accuracy", predicted == right)
    figures["f1/right"] = _f1(predicted, right)
    figures["f1/wrong"] = _f1(~predicted, ~right)
    figures["ece"], curve = calibration(_sigmoid(scores), labels)
    details = {
        "calibration": curve,
        "histogram": histogram({"right": scores[right], "wrong": scores[~right]}),
    }
    return _with_sources(EvalResult(figures, details), examples, sources, by_source)


def _share(name: str, wins: np.ndarray) -> dict[str, float]:
    """A share with its interval; it is left out, as no number, where there is nothing to share."""
    count = len(wins)
    low, high = wilson(float(wins.sum()), count)
    share = float(wins.mean()) if count else 0.0
    return {name: share, f"{name}_low": low, f"{name}_high": high, "count": count}


def _with_sources(
    found: EvalResult,
    examples: Mapping[str, np.ndarray],
    sources: Sequence[str],
    measure: Callable[[Mapping[str, np.ndarray]], dict[str, float]],
) -> EvalResult:
    """Adds the same figures for each source, where examples say which they come from."""
    figures = {name: value for name, value in found.figures.items() if name != "count"}
    details = found.details
    if "source" in examples:
        source, table = examples["source"], []
        for number, name in enumerate(sources):
            mine = source == number
            narrowed = {
                key: value & _wide(mine, value) if value.dtype == np.bool_ else value
                for key, value in examples.items()
            }
            row = measure(narrowed)
            if row["count"]:
                table.append({"source": name} | row)
                shown = next(key for key in row if key != "count")
                figures[f"{shown}/{name}"] = row[shown]
        details = details | {"sources": table}
    return EvalResult(figures, details)


def _wide(mine: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Which rows, for an array with further axes."""
    return mine.reshape(mine.shape + (1,) * (like.ndim - mine.ndim))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 where either does not vary."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of one class; 0 where it neither occurs nor is predicted."""
    hits = float((predicted & true).sum())
    total = float(predicted.sum() + true.sum())
    return 2 * hits / total if total else 0.0
