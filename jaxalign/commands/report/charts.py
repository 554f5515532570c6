"""Line and bar charts as SVG text, without library or script; the page sets the colours."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 370, 220
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 44

_MARKED = 40
_MOST = 300
_LARGEST = 8e307  # beyond it the difference of two values may be no number

# Characters that neither HTML nor XML allows, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(value: Any) -> str:
    """Text for HTML: escaped, and without characters that HTML forbids."""
    return html.escape(_ILLEGAL.sub("\ufffd", str(value)))


def nice_step(span: float, parts: int = 4) -> float:
    """The smallest of 1, 2, 5 × 10ᵏ that covers a positive span in at most `parts` steps."""
    raw = span / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * m for m in (1, 2, 5, 10, 20) if power * m >= raw * (1 - 1e-9))


def value_ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`; a constant gets some room."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 2 if low else 1.0
        low, high = low - room, high + room
    step = nice_step(high - low)
    digits = max(0, -math.floor(math.log10(step)))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, digits) for k in range(first, last + 1)]


def step_ticks(first: float, last: float) -> list[int]:
    """Whole round numbers between two steps."""
    width = max(1, round(nice_step(last - first))) if last > first else 1
    ticks = range(math.ceil(first / width) * width, math.floor(last) + 1, width)
    return list(ticks) or [round(first)]


def thin(points: Points, most: int = _MOST) -> list[tuple[float, float]]:
    """At most about `most` points that look the same: the lowest and highest of every stretch.

    The first and last points stay. A value that is not a number replaces its stretch, so that it
    remains visible.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        broken = [i for i in stretch if not _drawn(points[i][1])]
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
    finite = [y for _, y in points if _drawn(y)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    ticks = value_ticks(min(finite), max(finite)) if finite else [0.0, 1.0]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5
        return LEFT + share * (right - LEFT)

    def up(y: float) -> float:
        return bottom - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - TOP)

    numbered = step_ticks(first, last) if x_ticks is None else x_ticks
    parts = _frame(
        label,
        (x_label, y_label),
        [(across(tick), f"{tick:.10g}") for tick in numbered],
        [(up(tick), f"{tick:g}") for tick in ticks],
    )
    for number, line in enumerate(series):
        shown = thin(line)
        for piece in _pieces(shown):
            place = " ".join(f"{_number(across(x))},{_number(up(y))}" for x, y in piece)
            parts.append(f'<polyline class="s{number}" points="{place}"/>')
        dots = [(x, y) for x, y in shown if _drawn(y)]
        for x, y in dots if len(dots) <= _MARKED else dots[-1:]:
            place = f'cx="{_number(across(x))}" cy="{_number(up(y))}"'
            tip = f"<title>{text(x_label)} {x:g}: {y:.6g}</title>"
            parts.append(f'<circle class="s{number}" {place} r="2.5">{tip}</circle>')
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
      edges: of the bins, ascending, one more than there are bins.
      counts: of each group, one number a bin; drawn with the classes `s0`, `s1`, ….
      label: text for screen readers.
      x_label: under the horizontal axis.
      y_label: along the vertical axis.

    Raises:
      ValueError: no bin, or a group with another number of bins.
    """
    bins = len(edges) - 1
    if bins < 1 or any(len(group) != bins for group in counts):
        raise ValueError(f"chart {label!r}: {[len(group) for group in counts]} bars, {bins} bins")
    first, last = edges[0], edges[-1]
    ticks = value_ticks(0.0, max((max(group) for group in counts), default=1.0))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (right - LEFT)

    def up(y: float) -> float:
        return bottom - y / ticks[-1] * (bottom - TOP)

    inside = [tick for tick in value_ticks(first, last) if first <= tick <= last]
    parts = _frame(
        label,
        (x_label, y_label),
        [(across(tick), f"{tick:.10g}") for tick in inside],
        [(up(tick), f"{tick:g}") for tick in ticks if tick >= 0],
    )
    for place in range(bins):
        start, end = across(edges[place]), across(edges[place + 1])
        width = (end - start) / len(counts)
        for number, group in enumerate(counts):
            top = up(group[place])
            if group[place]:
                tip = f"{edges[place]:.4g} to {edges[place + 1]:.4g}: {group[place]:g}"
                parts.append(
                    f'<rect class="s{number}" x="{start + number * width:.2f}" y="{_number(top)}" '
                    f'width="{width:.2f}" height="{_number(bottom - top)}">'
                    f"<title>{text(tip)}</title></rect>"
                )
    return "".join([*parts, "</svg>"])


def _frame(
    label: str,
    names: tuple[str, str],
    across: Sequence[tuple[float, str]],
    up: Sequence[tuple[float, str]],
) -> list[str]:
    """The opening tag, the grid and both axes; ticks are (position, text)."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">']
    for place, written in up:
        y = _number(place)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y}" dy="4">{written}</text>')
    for place, written in across:
        x = _number(place)
        parts.append(f'<text class="mid" x="{x}" y="{bottom + 16}">{written}</text>')
    middle, height = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="mid" x="{middle:g}" y="{HEIGHT - 8}">{text(names[0])}</text>')
    turned = f'transform="rotate(-90 12 {height:g})"'
    parts.append(f'<text class="mid" x="12" y="{height:g}" {turned}>{text(names[1])}</text>')
    return parts


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """Stretches of two or more finite values; a lone point appears as its dot."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if _drawn(y):
            pieces[-1].append((x, y))
        else:
            pieces.append([])
    return [piece for piece in pieces if len(piece) > 1]


def _drawn(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= _LARGEST


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
