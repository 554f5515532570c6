"""Runs side by side: an overview, differences in configuration, and costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxalign.commands.report.axes import short, text
from jaxalign.commands.report.curves import swatch
from jaxalign.commands.report.load import Run
from jaxalign.commands.report.names import name_of, order_of
from jaxalign.commands.report.page import scrolling, table

TITLES = {"sft": "SFT", "reward": "Reward model", "dpo": "DPO", "kto": "KTO", "ppo": "PPO"}
"""Algorithm → its name for people."""

_LONGEST = 120  # characters of an option's value
_MOST_OPTIONS = 200
_MOST_ROWS = 1200
_SKIPPED = ("run.folder",)


def title_of(algorithm: str | None) -> str:
    """An algorithm's display name."""
    if algorithm is None:
        return "Runs without configuration"
    return TITLES.get(algorithm, algorithm)


def overview(runs: Sequence[Run]) -> str:
    """A row for each run: state, result, cost."""
    rows = [
        (
            run.name,
            title_of(run.algorithm) if run.algorithm else "unknown",
            run.state,
            run.result() or "–",
            _last(run, "tokens_seen"),
            duration(run.seconds) if run.seconds else "–",
        )
        for run in runs
    ]
    heads = ("run", "algorithm", "state", "result", "tokens seen", "time")
    marks = [swatch(run.number) for run in runs]
    made = table(heads, rows, numbers=(4, 5), marks=marks)
    return scrolling(made, "overview of the runs")


def costs(runs: Sequence[Run]) -> str:
    """Throughput and memory of each run; "" if nothing of it was recorded."""
    rows, heads = [], ["run", "tokens/s", "seconds a step", "waiting for data", "MFU"]
    has_memory = any(run.memory for run in runs)
    for run in runs:
        step, data = run.typical("time/step"), run.typical("time/data")
        cells = [
            _figure(run.typical("time/tokens_per_second")),
            _figure(step),
            f"{data / step:.0%}" if step and data is not None else "–",
            _share(run.typical("time/mfu")),
        ]
        if has_memory:
            cells += [_gib(run.memory.get("device_bytes")), _gib(run.memory.get("host_bytes"))]
        rows.append((run.name, *cells))
    if has_memory:
        heads += ["peak memory of a device", "of the host"]
    if all(set(row[1:]) == {"–"} for row in rows):
        return ""
    marks = [swatch(run.number) for run in runs]
    made = table(heads, rows, numbers=range(1, len(heads)), marks=marks)
    return scrolling(made, "throughput and memory")


def differences(runs: Sequence[Run]) -> str:
    """The options that differ between runs; "" for one run."""
    known = [run for run in runs if run.options]
    if len(known) < 2:
        return ""
    names = sorted({name for run in known for name in run.options if name not in _SKIPPED})
    rows = []
    for name in names:
        values = [run.options.get(name) for run in known]
        if len(set(values)) > 1:
            rows.append((name, *("–" if v is None else _cut(v) for v in values)))
    if not rows:
        return "<p>The configurations are the same, but for the folders.</p>"
    left = len(rows) - _MOST_OPTIONS
    note = f'<p class="note">{left} more options differ.</p>' if left > 0 else ""
    heads = ("option", *(run.name for run in known))
    marks = ["", *(swatch(run.number) for run in known)]
    made = table(heads, rows[:_MOST_OPTIONS], head_marks=marks)
    return scrolling(made, "options that differ") + note


def figures(runs: Sequence[Run]) -> str:
    """Every metric of every run as a table: what the charts show, in numbers."""
    keys = sorted({key for run in runs for key in run.curves}, key=order_of)
    rows: list[tuple[str, ...]] = []
    marks = []
    for key in keys:
        for run in runs:
            curve = run.curves.get(key)
            if curve is None:
                continue
            finite = [value for _, value in curve if math.isfinite(value)]
            ends = (short(min(finite)), short(max(finite))) if finite else ("–", "–")
            held = ", held out" if key.startswith("eval/") else ""
            first, last = short(curve[0][1]), short(curve[-1][1])
            rows.append((name_of(key).title + held, key, run.name, first, last, *ends))
            marks.append(swatch(run.number))
    left = len(rows) - _MOST_ROWS
    note = f'<p class="note">{left} more rows are left out.</p>' if left > 0 else ""
    heads = ("metric", "key", "run", "first", "last", "lowest", "highest")
    made = table(heads, rows[:_MOST_ROWS], numbers=(3, 4, 5, 6))
    return scrolling(made, "all metrics as a table") + note


def held_out(run: Run) -> str:
    """Held-out figures before and after; "" if there are none."""
    rows = []
    for key, curve in run.curves.items():
        if key.startswith("eval/"):
            (first, before), (last, after) = curve[0], curve[-1]
            start = short(before) if first == 0 else "not measured"
            end = short(after) if last > 0 else "not yet"
            name = key.removeprefix("eval/")
            rows.append((name_of(key).title, name, start, end, f"{last:g}"))
    if not rows:
        return ""
    heads = ("figure", "key", "before", "after", run.across)
    return scrolling(table(heads, rows, numbers=(2, 3, 4)), f"held-out figures of {run.name}")


def duration(seconds: float) -> str:
    """Seconds in readable form."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _last(run: Run, key: str) -> str:
    curve = run.curves.get(key)
    return short(curve[-1][1], 3) if curve else "–"


def _figure(value: float | None) -> str:
    return "–" if value is None else short(value, 3)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**30:.2f} GiB"


def _cut(value: str) -> str:
    return value if len(value) <= _LONGEST else value[: _LONGEST - 1] + "…"


def labelled(run: Run) -> str:
    """A run's name with its colour."""
    return f"{swatch(run.number)}{text(run.name)}"
