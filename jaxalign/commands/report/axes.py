"""Axes of SVG charts: round ticks, positions of values, grid and names."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

Points = Sequence[tuple[float, float]]

_LARGEST = 8e307  # beyond it the difference of two values may overflow

# Characters that neither HTML nor XML allows, not even escaped.
_ILLEGAL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def text(value: Any) -> str:
    """Text for HTML: escaped, and without characters that HTML forbids."""
    return html.escape(_ILLEGAL.sub("\ufffd", str(value)))


class Box(NamedTuple):
    """The size of a chart and the margins around its plot, in its own pixels."""

    width: int = 380
    height: int = 200
    left: int = 46
    right: int = 12
    top: int = 10
    bottom: int = 34


class Axes(NamedTuple):
    """Maps values to positions in a chart.

    Attributes:
      box: the chart's box.
      x: first and last horizontal value.
      y: lowest and highest value.
    """

    box: Box
    x: tuple[float, float]
    y: tuple[float, float]

    def across(self, value: float) -> float:
        """The horizontal position of a value; the middle if there is only one."""
        first, last = self.x
        share = (value - first) / (last - first) if last > first else 0.5
        right = self.box.width - self.box.right
        return self.box.left + share * (right - self.box.left)

    def up(self, value: float) -> float:
        """The vertical position of a value."""
        low, high = self.y
        bottom = self.box.height - self.box.bottom
        return bottom - (value - low) / (high - low) * (bottom - self.box.top)

    def points(self, values: Points) -> str:
        """Positions in the form of a `points` attribute."""
        return " ".join(f"{number(self.across(x))},{number(self.up(y))}" for x, y in values)

    def frame(
        self,
        label: str,
        names: tuple[str, str],
        across: Sequence[tuple[float, str]],
        up: Sequence[tuple[float, str]],
        attributes: str = "",
    ) -> list[str]:
        """The opening tag, the grid and both axes.

        Args:
          label: text for screen readers.
          names: names of the horizontal and the vertical axis; "" for none.
          across: horizontal ticks: values with their texts.
          up: vertical ticks, likewise.
          attributes: more attributes of the SVG, already escaped.
        """
        box = self.box
        right, bottom = box.width - box.right, box.height - box.bottom
        parts = [
            f'<svg viewBox="0 0 {box.width} {box.height}" role="img" aria-label="{text(label)}"'
            f"{attributes}>"
        ]
        for value, written in up:
            y = number(self.up(value))
            parts.append(f'<line class="grid" x1="{box.left}" x2="{right}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="end" x="{box.left - 6}" y="{y}" dy="4">{written}</text>')
        for value, written in across:
            x = number(self.across(value))
            parts.append(f'<text class="mid" x="{x}" y="{bottom + 16}">{written}</text>')
        middle, height = (box.left + right) / 2, (box.top + bottom) / 2
        if names[0]:
            place = f'x="{middle:g}" y="{box.height - 4}"'
            parts.append(f'<text class="mid" {place}>{text(names[0])}</text>')
        if names[1]:
            turned = f'transform="rotate(-90 12 {height:g})"'
            place = f'x="12" y="{height:g}"'
            parts.append(f'<text class="mid" {place} {turned}>{text(names[1])}</text>')
        return parts


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


def is_drawn(value: float) -> bool:
    """Whether a chart can show a value; others leave a gap."""
    return math.isfinite(value) and abs(value) <= _LARGEST


def pieces(points: Points) -> list[list[tuple[float, float]]]:
    """Runs of two or more consecutive values that can be drawn."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if is_drawn(y):
            found[-1].append((x, y))
        else:
            found.append([])
    return [piece for piece in found if len(piece) > 1]


def number(value: float) -> str:
    """A position, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def short(value: float, digits: int = 4) -> str:
    """A value in few characters, such as 12k, 2.125 or 1.5e-06."""
    if not math.isfinite(value):
        return str(value)
    for size, unit in _UNITS:
        if abs(value) >= max(size, 1e4):
            return f"{value / size:.{digits}g}{unit}" if abs(value) < 1e15 else f"{value:.2g}"
    # "2410", not "2.41e+03".
    return f"{value:.0f}" if 10**digits <= abs(value) < 1e4 else f"{value:.{digits}g}"
