"""Charts as SVG text: no library, no script; colours come from the page's style sheet."""

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

# What neither HTML nor XML may hold, in whatever way it is written.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def text(value: Any) -> str:
    """Text for HTML: escaped, and without characters that a page may not hold."""
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
    """At most about `most` points that look the same: of every stretch its lowest and highest.

    The first and the last point are kept; a value that is no number stands for its stretch, so
    that it is seen.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        broken = [i for i in stretch if not math.isfinite(points[i][1])]
        if broken:
            kept.add(broken[0])
            continue
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def line_chart(series: Sequence[Points], label: str, x_label: str, y_label: str) -> str:
    """One SVG with a line for each series; a value that is no number leaves a gap.

    Args:
      series: one or more lists of (step, value), in order of steps; drawn with the classes `s0`,
        `s1`, …
      label: says what is shown to those who cannot see it.
      x_label: under the horizontal axis.
      y_label: along the vertical axis.

    Raises:
      ValueError: no point at all.
    """
    points = [point for line in series for point in line]
    if not points:
        raise ValueError(f"chart {label!r}: no points to draw")
    finite = [y for _, y in points if math.isfinite(y)]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    ticks = value_ticks(min(finite), max(finite)) if finite else [0.0, 1.0]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def across(x: float) -> float:
        share = (x - first) / (last - first) if last > first else 0.5
        return LEFT + share * (right - LEFT)

    def up(y: float) -> float:
        return bottom - (y - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - TOP)

    places = [(tick, across(tick)) for tick in step_ticks(first, last)]
    parts = _frame(label, places, [(tick, up(tick)) for tick in ticks], x_label, y_label)
    for number, line in enumerate(series):
        shown = thin(line)
        for piece in _pieces(shown):
            place = " ".join(f"{_number(across(x))},{_number(up(y))}" for x, y in piece)
            parts.append(f'<polyline class="s{number}" points="{place}"/>')
        dots = [(x, y) for x, y in shown if math.isfinite(y)]
        for x, y in dots if len(dots) <= _MARKED else dots[-1:]:
            place = f'cx="{_number(across(x))}" cy="{_number(up(y))}"'
            tip = f"<title>{text(x_label)} {x:g}: {y:.6g}</title>"
            parts.append(f'<circle class="s{number}" {place} r="2.5">{tip}</circle>')
    return "".join([*parts, "</svg>"])


def bar_chart(
    bins: Sequence[tuple[int, int]], counts: Sequence[int], label: str, x_label: str, y_label: str
) -> str:
    """One SVG with a bar for each bin, from its first whole number to its last.

    Args:
      bins: first and last number of each, ascending, without gaps.
      counts: heights.
      label: says what is shown to those who cannot see it.
      x_label: under the horizontal axis.
      y_label: along the vertical axis.

    Raises:
      ValueError: no bin.
    """
    if not bins:
        raise ValueError(f"chart {label!r}: no bars to draw")
    ticks = value_ticks(0, max(counts))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    first, last = bins[0][0], bins[-1][1] + 1

    def across(x: float) -> float:
        return LEFT + (x - first) / (last - first) * (right - LEFT)

    def up(y: float) -> float:
        return bottom - y / ticks[-1] * (bottom - TOP)

    places = [(tick, across(tick)) for tick in step_ticks(first, last)]
    parts = _frame(label, places, [(tick, up(tick)) for tick in ticks], x_label, y_label)
    for (low, high), count in zip(bins, counts, strict=True):
        place = f'x="{_number(across(low))}" width="{_number(across(high + 1) - across(low) - 1)}"'
        size = f'y="{_number(up(count))}" height="{_number(bottom - up(count))}"'
        tip = f"<title>{text(x_label)} {low}–{high}: {count}</title>"
        parts.append(f"<rect {place} {size}>{tip}</rect>")
    return "".join([*parts, "</svg>"])


def _frame(label: str, across: Points, up: Points, x_label: str, y_label: str) -> list[str]:
    """The beginning of a chart: (value, place) of ticks on both axes, and what these are."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(label)}">']
    for tick, place in up:
        y = _number(place)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y}" dy="4">{tick:g}</text>')
    for tick, place in across:
        x = _number(place)
        parts.append(f'<text class="mid" x="{x}" y="{bottom + 16}">{tick}</text>')
    middle, height = (LEFT + right) / 2, (TOP + bottom) / 2
    parts.append(f'<text class="mid" x="{middle:g}" y="{HEIGHT - 8}">{text(x_label)}</text>')
    turned = f'transform="rotate(-90 12 {height:g})"'
    parts.append(f'<text class="mid" x="12" y="{height:g}" {turned}>{text(y_label)}</text>')
    return parts


def _pieces(points: Points) -> list[list[tuple[float, float]]]:
    """Stretches of finite values of two points or more; a lone point is drawn by its dot."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if math.isfinite(y):
            pieces[-1].append((x, y))
        else:
            pieces.append([])
    return [piece for piece in pieces if len(piece) > 1]


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
