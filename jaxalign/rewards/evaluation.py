"""Evaluates a reward model on held-out data: accuracies with intervals, calibration, histograms.

Numpy on the host, over the scores of all held-out examples. Each `evaluate_*` function returns an
`EvalResult`: figures for `metrics.jsonl`, and curves and tables for `evaluation.json`.
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
    """Result of an evaluation.

    Attributes:
      figures: name → number, for `metrics.jsonl`.
      details: JSON-able curves and tables, for `evaluation.json` and the report.
    """

    figures: dict[str, float]
    details: dict[str, Any]


def wilson(wins: float, count: int, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion of independent trials (Wilson 1927, eq. 4).

        (p + z²/2n ± z · √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),  p = wins/n

    Args:
      wins: number of successes, 0 to `count`.
      count: n, number of trials.
      z: quantile of the normal distribution; `Z95` for 95 %.

    Returns:
      (lower, upper) bound, in [0, 1]; (0, 1) for no trials.
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
    """Calibration of predicted probabilities, in bins of equal width.

        ECE = Σ_b n_b/n · |frequency_b − mean prediction_b|

    is the expected calibration error of Guo et al. 2017 (arXiv 1706.04599), eq. 3.

    Args:
      predicted: probabilities in [low, 1], `[N]`.
      happened: outcomes in [0, 1], `[N]`.
      low: lower edge of the first bin.
      bins: number of bins from `low` to 1; a bin contains its lower edge.

    Returns:
      (ECE, non-empty bins). A bin has `from`, `to`, `count`, mean `predicted`, mean `observed`, and
      `low` and `high`, the Wilson interval of `observed`. ECE is 0 without examples.
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
    """Histograms of several groups in common bins: `edges` `[bins + 1]`, `counts` by group."""
    values = np.concatenate([np.ravel(value) for value in groups.values()])
    edges = np.histogram_bin_edges(values, bins) if values.size else np.array([0.0, 1.0])
    counts = {name: np.histogram(value, edges)[0].tolist() for name, value in groups.items()}
    return {"edges": edges.tolist(), "counts": counts}


def evaluate_pairs(examples: Mapping[str, np.ndarray], sources: Sequence[str]) -> EvalResult:
    """Evaluates pairs: accuracy with its interval, calibration of win probabilities, scores.

    Calibration takes the probability that the answer with the higher score is the chosen one,

        p = σ(|r_chosen − r_rejected|) ∈ [½, 1],

    and compares it with the outcome: 1 if it is, 0 if not, ½ for equal scores.

    Args:
      examples: `chosen`, `rejected`, `mask` and optionally `source`, of one shape.
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
        lambda part: _share(
            "accuracy", part["chosen"][part["mask"]] > part["rejected"][part["mask"]]
        ),
    )


def evaluate_rankings(examples: Mapping[str, np.ndarray], sources: Sequence[str]) -> EvalResult:
    """Evaluates rankings: the share of prompts whose best answer scores highest; scores by rank.

    The interval is over prompts, which are independent; the pairs of one prompt are not.

    Args:
      examples: `scores`, `ranks`, `mask` `[N, K]`; `best` (1 if the best answer scores highest) and
        `says` (whether the ranks give any order) `[N]`; optionally `source` `[N]`.
      sources: names of the sources, in the order of their ids.
    """

    def best(part: Mapping[str, np.ndarray]) -> dict[str, float]:
        return _share("best", part["best"][part["says"]] > 0)

    scores, ranks, mask = (examples[name] for name in ("scores", "ranks", "mask"))
    top = np.max(np.where(mask, ranks, -np.inf), axis=1, keepdims=True, initial=-np.inf)
    chosen = mask & (ranks == top)
    groups = {"best": scores[chosen], "others": scores[mask & ~chosen]}
    details = {"histogram": histogram(groups)}
    return _with_sources(EvalResult(best(examples), details), examples, sources, best)


def evaluate_grades(
    examples: Mapping[str, np.ndarray], sources: Sequence[str], attributes: Sequence[str]
) -> EvalResult:
    """Evaluates grades: the correlation of prediction and grade for each attribute.

    Args:
      examples: `scores`, `grades`, `mask` `[N, A]`; optionally `source` `[N]`.
      sources: names of the sources, in the order of their ids.
      attributes: names of the columns.
    """

    def columns(part: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        columns = zip(part["scores"].T, part["grades"].T, part["mask"].T, strict=True)
        return [
            (score[mask].astype(np.float64), grade[mask].astype(np.float64))
            for score, grade, mask in columns
        ]

    def by_source(part: Mapping[str, np.ndarray]) -> dict[str, float]:
        errors = np.concatenate([np.square(score - grade) for score, grade in columns(part)])
        return {"mse": float(errors.mean()) if errors.size else 0.0, "count": len(errors)}

    pairs, figures = columns(examples), {}
    for name, (score, grade) in zip(attributes, pairs, strict=True):
        figures[f"pearson/{name}"] = _pearson(score, grade)
    table = [
        {
            "attribute": name,
            "count": len(grade),
            "mse": float(np.square(score - grade).mean()) if len(grade) else 0.0,
            "variance": float(np.var(grade)) if len(grade) else 0.0,
            "pearson": figures[f"pearson/{name}"],
        }
        for name, (score, grade) in zip(attributes, pairs, strict=True)
    ]
    scores = dict(zip(attributes, (score for score, _ in pairs), strict=True))
    details = {"attributes": table, "histogram": histogram(scores)}
    return _with_sources(EvalResult(figures, details), examples, sources, by_source)


def evaluate_steps(examples: Mapping[str, np.ndarray], sources: Sequence[str]) -> EvalResult:
    """Evaluates steps: accuracy and F1 at probability ½, and calibration of the probabilities.

        F1 = 2·TP / (2·TP + FP + FN)

    A label of ½ or more counts as right. F1 is given for right and for wrong steps: wrong ones are
    often rare and harder to find. Steps of one answer are not independent, so the interval is
    somewhat too narrow.

    Args:
      examples: `scores`, `labels`, `mask` and optionally `source`, `[N, T]`.
      sources: names of the sources, in the order of their ids.
    """

    def classify(part: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return part["scores"][part["mask"]] > 0, part["labels"][part["mask"]] >= 0.5

    def by_source(part: Mapping[str, np.ndarray]) -> dict[str, float]:
        predicted, right = classify(part)
        return _share("accuracy", predicted == right)

    mask = examples["mask"]
    scores, labels = (examples[name][mask].astype(np.float64) for name in ("scores", "labels"))
    predicted, right = classify(examples)
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
    """A proportion with its Wilson interval and count; 0 with interval (0, 1) without trials."""
    count = len(wins)
    low, high = wilson(float(wins.sum()), count)
    share = float(wins.mean()) if count else 0.0
    return {name: share, f"{name}_low": low, f"{name}_high": high, "count": count}


def _with_sources(
    result: EvalResult,
    examples: Mapping[str, np.ndarray],
    sources: Sequence[str],
    measure: Callable[[Mapping[str, np.ndarray]], dict[str, float]],
) -> EvalResult:
    """Adds the figures of each source, if the examples have a `source`."""
    figures = {name: value for name, value in result.figures.items() if name != "count"}
    details = result.details
    if "source" in examples:
        source, table = examples["source"], []
        for number, name in enumerate(sources):
            selected = source == number
            part = {
                key: value & _expand_dims(selected, value) if value.dtype == np.bool_ else value
                for key, value in examples.items()
            }
            row = measure(part)
            if row["count"]:
                table.append({"source": name} | row)
                shown = next(key for key in row if key != "count")
                figures[f"{shown}/{name}"] = row[shown]
        details = details | {"sources": table}
    return EvalResult(figures, details)


def _expand_dims(rows: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Appends axes of size 1 until `rows` has as many as `like`."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - rows.ndim))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def _pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; 0 if either is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def _f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """F1 of one class; 0 if it neither occurs nor is predicted."""
    hits = float((predicted & true).sum())
    total = float(predicted.sum() + true.sum())
    return 2 * hits / total if total else 0.0
