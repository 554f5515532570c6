"""Figures of an evaluation: numbers with 95 % intervals, as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.rewards.evaluation import Z95, wilson


class Figure(NamedTuple):
    """A number.

    Attributes:
      value: the number.
      low: lower end of its 95 % interval; None: it has none.
      high: upper end.
      count: the number of rows, pairs or tokens behind it.
      unit: the unit of `count`, for display.
    """

    value: float
    low: float | None
    high: float | None
    count: int
    unit: str


class Measured(NamedTuple):
    """The result of one measure.

    Attributes:
      figures: by name.
      notes: remarks, such as rows left out, for display.
      rows: the measurements of each row, JSON-able.
    """

    figures: dict[str, Figure]
    notes: Sequence[str] = ()
    rows: Sequence[dict[str, Any]] = ()


def share(wins: Sequence[float] | np.ndarray, unit: str = "rows") -> Figure:
    """A share of independent trials, each in [0, 1], with Wilson's interval."""
    values = np.asarray(wins, np.float64)
    low, high = wilson(float(values.sum()), len(values))
    return Figure(float(values.mean()) if len(values) else 0.0, low, high, len(values), unit)


def mean(values: Sequence[float] | np.ndarray, unit: str = "rows") -> Figure:
    """A mean with its normal interval, mean ± 1.96 s/√n."""
    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return Figure(float(array.mean()) if len(array) else 0.0, None, None, len(array), unit)
    middle, half = float(array.mean()), Z95 * float(array.std(ddof=1)) / np.sqrt(len(array))
    return Figure(middle, middle - half, middle + half, len(array), unit)


def to_text(results: dict[str, Measured]) -> str:
    """A line for each figure, and the notes."""
    lines = []
    for measure, result in results.items():
        for name, (value, low, high, count, unit) in result.figures.items():
            interval = "" if low is None else f"[{low:.4g}, {high:.4g}]"
            line = f"{measure + '/' + name:<40} {value:>10.4f}  {interval:<20} {count} {unit}"
            lines.append(line.rstrip())
        lines += [f"{measure}: {note}" for note in result.notes]
    return "\n".join(lines)


def to_json(results: dict[str, Measured]) -> dict[str, Any]:
    """The same, for programs."""
    return {
        measure: {
            "figures": {name: figure._asdict() for name, figure in result.figures.items()},
            "notes": list(result.notes),
            "rows": list(result.rows),
        }
        for measure, result in results.items()
    }
