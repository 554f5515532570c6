"""Reads the curves of `metrics.jsonl`, even if the file is damaged or still being written."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.data.bounds import parse_json

Curve = list[tuple[float, float]]


class Metrics(NamedTuple):
    """The contents of `metrics.jsonl`.

    Attributes:
      curves: metric → (step, value) in the order written; values may be infinite or NaN.
      cut: whether the last line is incomplete, as in a running or killed run.
      damaged: line numbers of other lines that are not a JSON object of numbers with a step.
    """

    curves: dict[str, Curve]
    cut: bool
    damaged: Sequence[int] = ()


def read_metrics(path: pathlib.Path) -> Metrics:
    """Reads `metrics.jsonl`.

    Raises:
      ValueError: the file is empty, or a line before the last is no JSON object of numbers.
    """
    found = scan_metrics(path)
    if found.damaged:
        number = found.damaged[0]
        line = _lines(path)[number - 1]
        raise ValueError(
            f"{path}:{number}: wanted a JSON object of numbers with a step, got {line[:60]!r}"
        )
    if not found.curves:
        raise ValueError(f"{path}: no metrics in it yet; wait for the run's first step")
    return found


def scan_metrics(path: pathlib.Path) -> Metrics:
    """Reads what can be read of `metrics.jsonl`, and counts the rest."""
    curves: dict[str, Curve] = {}
    damaged, cut = [], False
    lines = _lines(path)
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            step = float(row.pop("step"))
            values = {name: float(value) for name, value in row.items()}
            if not math.isfinite(step):
                raise ValueError(step)
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            if number == len(lines):
                cut = bool(line)
            else:
                damaged.append(number)
            continue
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    return Metrics(curves, cut, damaged)


def _lines(path: pathlib.Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
