"""A run's result in one line: the key metrics of its algorithm, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

_FIGURES = (
    # name in the metrics, display name, unit
    ("accuracy", "accuracy", ""),
    ("rewards/accuracies", "accuracy", ""),
    ("loss/nll", "loss", "nats a token"),
    ("objective/scores", "score", ""),
    ("response/length", "length", "tokens"),
)
_KL = "objective/kl"


def summary(
    before: Mapping[str, float],
    after: Mapping[str, float],
    history: Sequence[Mapping[str, float]],
) -> str:
    """The line, such as "held-out accuracy 0.5 → 0.94" or "score 0.1 → 1.2, KL 3.1 nats an answer".

    It shows held-out metrics if there are any; otherwise training metrics, as means over the first
    and the last tenth of the steps. KL is over the last tenth. "" if none is known.

    Args:
      before: held-out figures before the first step.
      after: held-out figures after the last.
      history: metrics of every step, oldest first.
    """
    parts, told = [], set()
    for name, word, unit in _FIGURES:
        first, last, place = before.get(name), after.get(name), "held-out "
        if last is None:
            first, last, place = _mean(history, name, False), _mean(history, name, True), ""
        if last is None or word in told:
            continue
        told.add(word)
        start = "" if first is None else f"{first:.3g} → "
        parts.append(f"{place}{word} {start}{last:.3g} {unit}".rstrip())
    kl = _mean(history, _KL, True)
    if kl is not None:
        parts.append(f"KL {kl:.3g} nats an answer")
    return ", ".join(parts)


def _mean(history: Sequence[Mapping[str, float]], name: str, last: bool) -> float | None:
    """A metric's mean over the first or last tenth (at least one) of the steps that have it."""
    values = [row[name] for row in history if math.isfinite(row.get(name, math.nan))]
    if not values:
        return None
    size = max(1, len(values) // 10)
    part = values[-size:] if last else values[:size]
    return sum(part) / size
