"""Curves of several runs in one chart: faint noise, its mean on top, held-out metrics dashed."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.commands.report.axes import (
    Axes,
    Box,
    Points,
    is_drawn,
    number,
    pieces,
    short,
    step_ticks,
    text,
    value_ticks,
)
from jaxalign.commands.report.charts import thin
from jaxalign.commands.report.names import Name

COLOURS = 8
"""How many runs have a colour of their own; later ones are dashed as well."""

_SMOOTHED = 60  # the fewest points for a mean on top of a noisy curve
_WINDOWS = 40  # windows of the mean along a curve
_NOISY = 3.0  # a noisy curve's total variation, as a multiple of its mean's
_SPIKE = 4.0  # a range above this multiple of nearly all values' range is cut
_MARKED = 24
_LEGEND = 4


class Line(NamedTuple):
    """A curve of a chart.

    Attributes:
      run: the name of the run.
      number: the run's number, from 0; determines colour and dashes.
      points: (step, value), in order of steps.
      held_out: whether these are held-out metrics.
    """

    run: str
    number: int
    points: Points
    held_out: bool = False


def style_of(run: int) -> str:
    """The classes of a run: colour, and dashes from the ninth on."""
    return f"s{run % COLOURS}" + (" dash" if run >= COLOURS else "")


def swatch(run: int) -> str:
    """A square in a run's colour."""
    return f'<i class="{style_of(run)}" aria-hidden="true"></i>'


def figure(name: Name, key: str, lines: Sequence[Line], across: str, most: int) -> str:
    """A chart with its caption: name, key, last values.

    Args:
      name: the metric's name.
      key: the metric's key in `metrics.jsonl`.
      lines: one or two lines per run.
      across: the text below the horizontal axis.
      most: the approximate maximum points of a curve.
    """
    unit = f'<span class="unit">{text(name.unit)}</span>' if name.unit else ""
    head = f'<b>{text(name.title)}</b> {unit}<code title="as in metrics.jsonl">{text(key)}</code>'
    return (
        f"<figure><figcaption>{head}{_legend(lines)}</figcaption>"
        f"{curve_chart(name, lines, across, most)}</figure>"
    )


def _legend(lines: Sequence[Line]) -> str:
    """The last value of every run, if they are few: more are in the table and in the tooltips."""
    runs = {line.number: line.run for line in lines}
    if len(runs) > _LEGEND:
        return ""
    items = []
    for run, name in runs.items():
        last = [
            ("held out " if line.held_out else "") + short(line.points[-1][1])
            for line in lines
            if line.number == run
        ]
        shown = text(", ".join(last))
        hidden = f'<span class="hidden">{text(name)}: </span>' if len(runs) > 1 else ""
        items.append(f'<span class="last" data-run="{run}">{swatch(run)}{hidden}{shown}</span>')
    return f'<span class="lasts">{"".join(items)}</span>'


def curve_chart(name: Name, lines: Sequence[Line], across: str, most: int) -> str:
    """The SVG; a value that is not a number leaves a gap.

    A curve longer than `most` keeps the lowest and highest value of every stretch. A noisy one is
    drawn faint, with its mean over a fortieth of its length on top. Spikes far beyond nearly all
    values are cut at the edge, and the label gives their size.

    Raises:
      ValueError: no point at all.
    """
    every = [point for line in lines for point in line.points]
    if not every:
        raise ValueError(f"chart {name.title!r}: no points to draw")
    means = [_mean(line) for line in lines]
    low, high, cut = _range(lines)
    ticks = value_ticks(low, high)
    box = Box()
    axes = Axes(box, (min(x for x, _ in every), max(x for x, _ in every)), (ticks[0], ticks[-1]))
    ends = " ".join(f"{value:.10g}" for value in (*axes.x, *axes.y))
    parts = axes.frame(
        _spoken(name, lines, across, cut),
        (across, ""),
        [(tick, short(tick, 6)) for tick in step_ticks(*axes.x)],
        [(tick, short(tick)) for tick in ticks],
        f' class="curves" data-axes="{ends}" data-across="{text(across)}"',
    )
    for line, mean in zip(lines, means, strict=True):
        parts.append(_drawn(line, mean, axes, most))
    return "".join([*parts, "</svg>"])


def _drawn(line: Line, mean: Points | None, axes: Axes, most: int) -> str:
    """A line as a group: faint noise and mean, or the values themselves."""
    low, high = axes.y

    def inside(points: Points) -> Points:
        return [(x, min(max(y, low), high) if is_drawn(y) else y) for x, y in thin(points, most)]

    shown = inside(line.points)
    parts = []
    if mean is not None:
        parts += [_polyline("noise", piece, axes) for piece in pieces(shown)]
        shown = inside(mean)
    kind = "held" if line.held_out else "main"
    parts += [_polyline(kind, piece, axes) for piece in pieces(shown)]
    dots = [(x, y) for x, y in shown if is_drawn(y)]
    marked = dots if line.held_out and len(dots) <= _MARKED else dots if len(dots) == 1 else []
    for x, y in marked:
        place = f'cx="{number(axes.across(x))}" cy="{number(axes.up(y))}"'
        parts.append(f'<circle {place} r="{2.5 if line.held_out else 3}"/>')
    name = f"{line.run}, held out" if line.held_out else line.run
    attributes = f'class="{style_of(line.number)}" data-run="{line.number}"'
    return f'<g {attributes} data-name="{text(name)}">{"".join(parts)}</g>'


def _polyline(kind: str, piece: Points, axes: Axes) -> str:
    return f'<polyline class="{kind}" points="{axes.points(piece)}"/>'


def _mean(line: Line) -> list[tuple[float, float]] | None:
    """The mean around every point; None for a curve that is short, smooth or held out."""
    points = [(x, y) for x, y in line.points if is_drawn(y)]
    if line.held_out or len(points) < _SMOOTHED:
        return None
    half = max(1, len(points) // _WINDOWS // 2)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    mean = []
    for place, (x, _) in enumerate(points):
        # As many on either side, so that a slope stays a slope up to its ends.
        reach = min(half, place, len(points) - 1 - place)
        start, end = place - reach, place + reach + 1
        mean.append((x, (sums[end] - sums[start]) / (end - start)))
    return mean if _way(points) > _NOISY * _way(mean) else None


def _way(points: Points) -> float:
    """The total variation of a curve."""
    return sum(abs(b - a) for (_, a), (_, b) in itertools.pairwise(points))


def _range(lines: Sequence[Line]) -> tuple[float, float, float | None]:
    """The lowest and highest value shown, and the largest value cut off, or None."""
    values = [y for line in lines for _, y in line.points if is_drawn(y)]
    if not values:
        return 0.0, 1.0, None
    low, high = min(values), max(values)
    if len(values) < _SMOOTHED:
        return low, high, None
    # 98 of 100 values, and every held-out figure.
    cuts = statistics.quantiles(values, n=100)
    whole = [y for line in lines if line.held_out for _, y in line.points if is_drawn(y)]
    inner_low, inner_high = min([cuts[0], *whole]), max([cuts[-1], *whole])
    if high - low <= _SPIKE * (inner_high - inner_low) or inner_high <= inner_low:
        return low, high, None
    return inner_low, inner_high, high if high - inner_high > inner_low - low else low


def _spoken(name: Name, lines: Sequence[Line], across: str, cut: float | None) -> str:
    """The chart in words."""
    parts = []
    for line in lines:
        finite = [(y, x) for x, y in line.points if is_drawn(y)]
        if not finite:
            parts.append(f"{line.run}: no finite value")
            continue
        (low, low_at), (high, high_at) = min(finite), max(finite)
        held = ", held out" if line.held_out else ""
        parts.append(
            f"{line.run}{held}: {short(finite[0][0])} at {across} {finite[0][1]:g}, "
            f"{short(finite[-1][0])} at {finite[-1][1]:g}, lowest {short(low)} at {low_at:g}, "
            f"highest {short(high)} at {high_at:g}"
        )
    spike = "" if cut is None else f" Spikes up to {short(cut)} are cut at the edge."
    unit = f" ({name.unit})" if name.unit else ""
    return f"{name.title}{unit}. {'; '.join(parts)}.{spike}"
