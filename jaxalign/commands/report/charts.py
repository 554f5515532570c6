"""Line and bar charts as SVG text, without library or script; the page sets the colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxalign.commands.report.axes import (
    Axes,
    Box,
    Points,
    is_drawn,
    nice_step,
    number,
    pieces,
    step_ticks,
    text,
    value_ticks,
)

__all__ = ["bar_chart", "line_chart", "nice_step", "step_ticks", "text", "thin", "value_ticks"]

_BOX = Box(width=370, height=220, left=70, right=20, top=16, bottom=44)
_MARKED = 40
_MOST = 300


def thin(points: Points, most: int = _MOST) -> list[tuple[float, float]]:
    """Thins points to about `most` without visible change: keeps each stretch's lowest and highest.

    The first and last points stay. A value that is not a number replaces its stretch, so that it
    remains visible.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        broken = [i for i in stretch if not is_drawn(points[i][1])]
        if broken:
            kept.add(broken[0])
            continue
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def line_chart(
    series: Sequence[Points],
    label: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[float] | None = None,
) -> str:
    """One SVG with a line for each series; a value that is not a number leaves a gap.

    Args:
      series: one or more lists of (step, value), in order of steps; drawn with the classes `s0`,
        `s1`, …
      label: text for screen readers.
      x_label: under the horizontal axis.
      y_label: along the vertical axis.
      x_ticks: numbers on the horizontal axis; whole steps by default.

    Raises:
      ValueError: no point at all.
    """
    points = [point for line in series for point in line]
    if not points:
        raise ValueError(f"chart {label!r}: no points to draw")
    finite = [y for _, y in points if is_drawn(y)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    ticks = value_ticks(min(finite), max(finite)) if finite else [0.0, 1.0]
    axes = Axes(_BOX, (first, last), (ticks[0], ticks[-1]))
    numbered = step_ticks(first, last) if x_ticks is None else x_ticks
    parts = axes.frame(
        label,
        (x_label, y_label),
        [(tick, f"{tick:.10g}") for tick in numbered],
        [(tick, f"{tick:g}") for tick in ticks],
    )
    for count, line in enumerate(series):
        shown = thin(line)
        for piece in pieces(shown):
            parts.append(f'<polyline class="s{count}" points="{axes.points(piece)}"/>')
        dots = [(x, y) for x, y in shown if is_drawn(y)]
        for x, y in dots if len(dots) <= _MARKED else dots[-1:]:
            place = f'cx="{number(axes.across(x))}" cy="{number(axes.up(y))}"'
            tip = f"<title>{text(x_label)} {x:g}: {y:.6g}</title>"
            parts.append(f'<circle class="s{count}" {place} r="2.5">{tip}</circle>')
    return "".join([*parts, "</svg>"])


def bar_chart(
    edges: Sequence[float],
    counts: Sequence[Sequence[float]],
    label: str,
    x_label: str,
    y_label: str,
) -> str:
    """One SVG with a bar for each bin and group, the groups of a bin side by side.

    Args:
      edges: the bins' edges, ascending, one more than there are bins.
      counts: for each group one number per bin; drawn with the classes `s0`, `s1`, ….
      label: text for screen readers.
      x_label: under the horizontal axis.
      y_label: along the vertical axis.

    Raises:
      ValueError: no bins, or a group with a different number of bins.
    """
    bins = len(edges) - 1
    if bins < 1 or any(len(group) != bins for group in counts):
        raise ValueError(f"chart {label!r}: {[len(group) for group in counts]} bars, {bins} bins")
    first, last = edges[0], edges[-1]
    ticks = value_ticks(0.0, max((max(group) for group in counts), default=1.0))
    axes = Axes(_BOX, (first, last), (0.0, ticks[-1]))
    bottom = _BOX.height - _BOX.bottom
    inside = [tick for tick in value_ticks(first, last) if first <= tick <= last]
    parts = axes.frame(
        label,
        (x_label, y_label),
        [(tick, f"{tick:.10g}") for tick in inside],
        [(tick, f"{tick:g}") for tick in ticks if tick >= 0],
    )
    for place in range(bins):
        start, end = axes.across(edges[place]), axes.across(edges[place + 1])
        width = (end - start) / len(counts)
        for count, group in enumerate(counts):
            top = axes.up(group[place])
            if group[place]:
                tip = f"{edges[place]:.4g} to {edges[place + 1]:.4g}: {group[place]:g}"
                parts.append(
                    f'<rect class="s{count}" x="{start + count * width:.2f}" y="{number(top)}" '
                    f'width="{width:.2f}" height="{number(bottom - top)}">'
                    f"<title>{text(tip)}</title></rect>"
                )
    return "".join([*parts, "</svg>"])
