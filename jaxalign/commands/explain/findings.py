"""What stands out in a step, compared with its own rows and with earlier steps.

A value stands out if it is more than `FAR` spreads from the median. The spread is the median
absolute deviation, scaled to a standard deviation, and never less than a tenth of the median.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.commands.explain.rows import SHARE, Row

FAR = 5.0
"""Spreads from the median at which a value stands out."""

BEFORE, LEAST_BEFORE, LEAST_ROWS = 20, 3, 4
"""Steps that a step is compared with, how many there must be, and how many rows."""

_MAD = 1.4826  # ratio of standard deviation to median absolute deviation, for a normal distribution
_PART, _LEAST_LOSS, _LEAST_STEP = 0.1, 0.05, 1e-3
_LARGE_SHARE = 0.5

WATCHED = (
    *("loss", "grad_norm", "accuracy", "margin", "kl", "rewards/margins", "rewards/accuracies"),
    *("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"),
    *("objective/scores", "objective/kl", "objective/rlhf_reward", "response/length"),
    *("policy/clipfrac_avg", "policy/approxkl_avg"),
)
"""Metrics in which a step is compared with those before it."""


class Finding(NamedTuple):
    """One thing that stands out.

    Attributes:
      kind: "jump", "loss", "score", "mask", "share", "left out" or "not finite".
      message: the text to show.
      row: its index among the step's rows; None: it concerns the whole step.
    """

    kind: str
    message: str
    row: int | None = None


def findings(
    step: int, metrics: Mapping[int, Mapping[str, Any]], rows: Sequence[Row]
) -> list[Finding]:
    """Everything that stands out, the whole step first.

    Args:
      step: its number.
      metrics: step → its recorded metrics.
      rows: the step's rows.
    """
    return [
        *_left_out(metrics[step]),
        *_jumps(step, metrics),
        *_far_rows(rows, metrics[step]),
        *_masks(rows),
        *_shares(rows),
    ]


def median_and_spread(values: Sequence[float], least: float) -> tuple[float, float]:
    """The median of finite values, and their spread; `least` bounds it from below.

    >>> median_and_spread([1.0, 1.0, 1.0, 9.0], 0.05)
    (1.0, 0.1)
    """
    finite = np.asarray([value for value in values if math.isfinite(value)], np.float64)
    if not finite.size:
        return math.nan, math.nan
    middle = float(np.median(finite))
    spread = _MAD * float(np.median(np.abs(finite - middle)))
    return middle, max(spread, _PART * abs(middle), least)


def _left_out(metrics: Mapping[str, Any]) -> list[Finding]:
    bad = float(metrics.get("bad_steps", 0))
    if not bad:
        return []
    why = ", ".join(f"{name}={metrics[name]}" for name in ("loss", "grad_norm") if name in metrics)
    return [Finding("left out", f"{bad:g} of its updates left the weights as they were: {why}")]


def _jumps(step: int, metrics: Mapping[int, Mapping[str, Any]]) -> list[Finding]:
    found = []
    earlier = [number for number in sorted(metrics) if number < step][-BEFORE:]
    names = [n for n in metrics[step] if n in WATCHED or n.startswith("grad_norm/")]
    for name in names:
        before = [float(metrics[number][name]) for number in earlier if name in metrics[number]]
        if len(before) < LEAST_BEFORE:
            continue
        middle, spread = median_and_spread(before, _LEAST_STEP)
        value = float(metrics[step][name])
        if not abs(value - middle) <= FAR * spread:  # also true for NaN
            kind = "jump" if math.isfinite(value) else "not finite"
            text = f"{name} is {value:.4g}; the median of the {len(before)} steps before: "
            found.append(Finding(kind, f"{text}{middle:.4g}"))
    return found


def _far_rows(rows: Sequence[Row], metrics: Mapping[str, Any]) -> list[Finding]:
    found = []
    # Rows that do not count have none; if the step's value is NaN, affected rows have none either.
    spoilt = math.isnan(float(metrics.get("loss", 0.0)))
    for name, least in (("loss", _LEAST_LOSS), ("score", _LEAST_STEP)):
        values = [row.figures.get(name, math.nan) for row in rows]
        known = [value for value in values if math.isfinite(value)]
        middle, spread = median_and_spread(known, least)
        for number, (row, value) in enumerate(zip(rows, values, strict=True)):
            broken = math.isnan(value) and spoilt and name in row.figures
            if math.isinf(value) or broken:
                found.append(Finding("not finite", f"{row.name}: {name} is {value}", number))
            elif len(known) >= LEAST_ROWS and _is_far(value - middle, spread, both=name == "score"):
                text = f"{row.name}: {name} {value:.4g}, the step's median is {middle:.4g}"
                found.append(Finding(name, text, number))
    return found


def _is_far(gap: float, spread: float, *, both: bool) -> bool:
    return (abs(gap) if both else gap) > FAR * spread


def _masks(rows: Sequence[Row]) -> list[Finding]:
    """Rows with no trained token, or only trained tokens, unless most rows are like that."""
    found = []
    for row in rows:
        for document in row.documents:
            # The first token is not a target.
            count, most = int(document.trained.sum()), len(document.ids) - 1
            found.append("none" if not count else "all" if count == most else "some")
    whole = {kind: found.count(kind) for kind in ("none", "all")}
    usual = {kind for kind, count in whole.items() if 2 * count > len(found)}
    result, at = [], 0
    for kind, text in (("none", "no token is trained"), ("all", "every token is trained")):
        if kind in usual:
            result.append(
                Finding("mask", f"{text} in {whole[kind]} of {len(found)} texts of the step")
            )
    for number, row in enumerate(rows):
        for document in row.documents:
            kind = found[at]
            at += 1
            if kind != "some" and kind not in usual:
                side = f" {document.name}" if document.name else ""
                what = "no token of it is trained"
                if kind == "all":
                    what = f"all of its {len(document.ids) - 1} targets are trained, prompt too"
                result.append(Finding("mask", f"{row.name}{side}: {what}", number))
    return result


def _shares(rows: Sequence[Row]) -> list[Finding]:
    if len(rows) < LEAST_ROWS:
        return []
    return [
        Finding("share", f"{row.name} has {row.figures[SHARE]:.0%} of the squared gradient", number)
        for number, row in enumerate(rows)
        if row.figures.get(SHARE, 0.0) > _LARGE_SHARE
    ]
