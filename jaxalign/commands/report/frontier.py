"""KL against reward: the KL cost of each run's score, and the best score at each KL."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.commands.report.axes import Axes, Box, number, short, text, value_ticks
from jaxalign.commands.report.curves import style_of, swatch
from jaxalign.commands.report.load import Run
from jaxalign.commands.report.page import table

KL, SCORE = "objective/kl", "objective/scores"

_BOX = Box(width=620, height=320, left=52, right=18, top=14, bottom=40)
_DOTS = 40
_FEWEST = 3  # the fewest held-out measurements for a path
_BUDGETS = 4


class Path(NamedTuple):
    """A run's way through KL and score.

    Attributes:
      run: of the path.
      held_out: whether the points are from held-out prompts, otherwise from training prompts.
      points: (KL in nats per answer, score, step), in order of steps.
    """

    run: Run
    held_out: bool
    points: list[tuple[float, float, float]]


def paths_of(runs: Sequence[Run]) -> list[Path]:
    """The paths of runs with KL and score; from held-out metrics if there are enough."""
    found = []
    for run in runs:
        for prefix, fewest in (("eval/", _FEWEST), ("", 1)):
            points = _pairs(run, prefix)
            if len(points) >= fewest:
                found.append(Path(run, bool(prefix), points))
                break
    return found


def _pairs(run: Run, prefix: str) -> list[tuple[float, float, float]]:
    scores = dict(run.curves.get(prefix + SCORE, ()))
    points = [
        (kl, scores[step], step)
        for step, kl in run.curves.get(prefix + KL, ())
        if step in scores and math.isfinite(kl) and math.isfinite(scores[step])
    ]
    if len(points) <= _DOTS:
        return points
    # Means over stretches: a single iteration's score is mostly noise.
    size = math.ceil(len(points) / _DOTS)
    stretches = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (
            sum(p[0] for p in part) / len(part),
            sum(p[1] for p in part) / len(part),
            part[-1][2],
        )
        for part in stretches
    ]


def best_so_far(paths: Sequence[Path]) -> list[tuple[float, float]]:
    """The frontier, ordered by KL: points whose score no point with lower or equal KL exceeds."""
    frontier: list[tuple[float, float]] = []
    for kl, score, _ in sorted(point for path in paths for point in path.points):
        if not frontier or score > frontier[-1][1]:
            frontier.append((kl, score))
    return frontier


def frontier_section(runs: Sequence[Run]) -> str:
    """The chart and its table; "" if no run has both figures."""
    paths = paths_of(runs)
    if not paths:
        return ""
    kinds = {path.held_out for path in paths}
    where = "held-out prompts" if kinds == {True} else "the prompts of training"
    if len(kinds) == 2:
        where = "held-out prompts, or those of training where a run has too few of them"
    note = (
        f"Every dot is an {paths[0].run.across}, measured on {where}; larger dots are later. Up "
        "and to the left is better: more score for less distance from the reference. The dotted "
        "line is the best score that any run reached within a KL."
    )
    return (
        f'<h3>KL against reward</h3><p class="note">{text(note)}</p>'
        f'<div class="pair"><figure>{_chart(paths)}</figure>{_table(paths)}</div>'
    )


def _chart(paths: Sequence[Path]) -> str:
    points = [point for path in paths for point in path.points]
    across = value_ticks(min(0.0, *(p[0] for p in points)), max(p[0] for p in points))
    up = value_ticks(min(p[1] for p in points), max(p[1] for p in points))
    axes = Axes(_BOX, (across[0], across[-1]), (up[0], up[-1]))
    said = "; ".join(
        f"{path.run.name}: score {short(path.points[-1][1])} at {short(path.points[-1][0])} nats "
        f"after {path.run.across} {path.points[-1][2]:g}"
        for path in paths
    )
    parts = axes.frame(
        f"Score against KL from the reference. {said}.",
        ("KL from the reference, nats an answer", "score"),
        [(tick, short(tick)) for tick in across],
        [(tick, short(tick)) for tick in up],
    )
    best = best_so_far(paths)
    stairs = [best[0]]
    for kl, score in best[1:]:
        stairs += [(kl, stairs[-1][1]), (kl, score)]
    stairs.append((across[-1], stairs[-1][1]))
    parts.append(f'<polyline class="best" points="{axes.points(stairs)}"/>')
    parts += [_path(path, axes) for path in paths]
    return "".join([*parts, "</svg>"])


def _path(path: Path, axes: Axes) -> str:
    run, points = path.run, path.points
    line = axes.points([(kl, score) for kl, score, _ in points])
    parts = [f'<polyline class="noise" points="{line}"/>'] if len(points) > 1 else []
    for place, (kl, score, step) in enumerate(points, start=1):
        share = place / len(points)
        tip = f"{run.name}, {run.across} {step:g}: score {short(score)} at {short(kl)} nats"
        kind = ' class="end-dot"' if place == len(points) else ""
        parts.append(
            f'<circle{kind} cx="{number(axes.across(kl))}" cy="{number(axes.up(score))}" '
            f'r="{1.5 + 3 * share:.1f}" opacity="{0.35 + 0.65 * share:.2f}">'
            f"<title>{text(tip)}</title></circle>"
        )
    return f'<g class="{style_of(run.number)}" data-run="{run.number}">{"".join(parts)}</g>'


def _table(paths: Sequence[Path]) -> str:
    """The best score of each run within some budgets of KL."""
    most = max(point[0] for path in paths for point in path.points)
    budgets = [tick for tick in value_ticks(0.0, most) if tick > 0][:_BUDGETS] if most > 0 else []
    rows = []
    for path in paths:
        cells: list[str] = []
        for budget in budgets:
            within = [score for kl, score, _ in path.points if kl <= budget]
            cells.append(short(max(within)) if within else "–")
        last = path.points[-1]
        rows.append((path.run.name, *cells, short(last[1]), short(last[0])))
    heads = ("best score within", *(f"{short(b)} nats" for b in budgets), "last", "at nats")
    swatches = [swatch(path.run.number) for path in paths]
    made = table(heads, rows, numbers=range(1, len(heads)), marks=swatches)
    return f'<div class="wide" tabindex="0" role="group" aria-label="score by KL">{made}</div>'
