"""A run, or the stages of a pipeline, as one HTML page that needs no other file.

It has the curves of `metrics.jsonl`, held-out figures before and after, configuration and versions;
for a quickstart also its figures, contests and answers (`quickstart`).
"""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxalign.commands.report.charts import bar_chart, line_chart, text, value_ticks
from jaxalign.commands.report.page import page, table
from jaxalign.commands.report.quickstart import summary_sections
from jaxalign.data.bounds import parse_json
from jaxalign.data.remote import fetch, is_address
from jaxalign.hf.source import read_json
from jaxalign.run.config.runs import RUNS
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.reporter import SHOWN

Curve = list[tuple[float, float]]

_FIRST = (*SHOWN, "grad_norm")
"""Charts that are open when the page is; the others are folded away."""

_UNITS = {
    "objective/kl": "nats an answer",
    "response/length": "tokens",
    "time/step": "seconds",
    "time/data": "seconds",
}


class Metrics(NamedTuple):
    """The contents of `metrics.jsonl`.

    Attributes:
      curves: metric → (step, value) in the order written; values may be infinite or NaN.
      cut: whether the last line is incomplete, as in a run that is under way or was killed.
    """

    curves: dict[str, Curve]
    cut: bool


def write_report(
    folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Writes the page of a run or pipeline; returns the file.

    Args:
      folder: a run's folder, or one whose sub-folders are runs, also in a bucket.
      out: HTML file to write; `report.html` in the folder by default, if that is of this machine.

    Raises:
      ValueError: no run there, metrics that are empty or broken, a broken configuration, or no
        file named for a folder in a bucket.
    """
    if out is None and is_address(folder):
        raise ValueError(f"{os.fspath(folder)}: the page is not written there; name a file: --out")
    page = make_page(folder)
    path = pathlib.Path(folder) / "report.html" if out is None else pathlib.Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def make_page(folder: str | os.PathLike[str]) -> str:
    """The page as text, well-formed as HTML and as XML; see `write_report`."""
    path = _fetch(os.fspath(folder)) if is_address(folder) else pathlib.Path(folder)
    runs = find_runs(path)
    body = []
    if (path / "summary.json").is_file():
        body.append(summary_sections(path / "summary.json"))
    body += [_run(run, title=None if run == path else run.name) for run in runs]
    return page(path.resolve().name, body)


def _fetch(address: str) -> pathlib.Path:
    """A copy of runs in a bucket, without what is large."""
    large = {"checkpoints", "model"}
    return fetch(address, "folder", accept=lambda name: large.isdisjoint(name.split("/")[:2]))


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder itself if it is a run, else the runs in it, in the order they were started.

    Raises:
      ValueError: there is none.
    """
    if (folder / "metrics.jsonl").is_file():
        return [folder]

    def started(run: pathlib.Path) -> tuple[float, str]:
        config = run / "config.yaml"  # written once, at the start
        return (config.stat().st_mtime if config.is_file() else math.inf, run.name)

    found = sorted((path.parent for path in folder.glob("*/metrics.jsonl")), key=started)
    if not found:
        raise ValueError(
            f"{folder}: no metrics.jsonl in it or in a folder of it; give the folder of a run "
            f"(run.folder) or of a pipeline"
        )
    return found


def read_metrics(path: pathlib.Path) -> Metrics:
    """Reads `metrics.jsonl`.

    Raises:
      ValueError: the file is empty, or a line before the last is no JSON object of numbers.
    """
    curves: dict[str, Curve] = {}
    lines = path.read_text(encoding="utf-8", errors="replace").removesuffix("\n").split("\n")
    cut = False
    for number, line in enumerate(lines, start=1):
        try:
            row = parse_json(line)
            step = float(row.pop("step"))
            values = {name: float(value) for name, value in row.items()}
            if not math.isfinite(step):
                raise ValueError(step)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if number == len(lines):
                cut = True
                continue
            raise ValueError(
                f"{path}:{number}: wanted a JSON object of numbers with a step, got {line[:60]!r}"
            ) from error
        for name, value in values.items():
            curves.setdefault(name, []).append((step, value))
    if not curves:
        raise ValueError(f"{path}: no metrics in it yet; wait for the run's first step")
    return Metrics(curves, cut)


# --- sections ------------------------------------------------------------------------------------


def _run(folder: pathlib.Path, title: str | None) -> str:
    curves, cut = read_metrics(folder / "metrics.jsonl")
    config = folder / "config.yaml"
    values = read_yaml(config) if config.is_file() else {}
    algorithm = next((name for name in RUNS if name in values), None)
    across = "iteration" if algorithm == "ppo" else "step"
    steps = max(step for curve in curves.values() for step, _ in curve)

    parts = [] if title is None else [f"<h2>{text(title)}</h2>"]
    facts = [f"{algorithm}, " if algorithm else "", f"{steps:g} {across}s"]
    parts.append(f'<p class="note">{"".join(facts)}</p>')
    if cut:
        parts.append('<p class="note">The last line of metrics.jsonl is cut off; left out.</p>')
    held_out = {name: curve for name, curve in curves.items() if name.startswith("eval/")}
    if held_out:
        parts.append("<h3>Held out</h3>" + _held_out(held_out, across))
    if (folder / "evaluation.json").is_file():
        parts.append(_evaluation(folder / "evaluation.json", across))

    groups = _grouped(curves)
    charts = {
        name: _figure(name, [curves[line] for line in lines], lines, across)
        for name, lines in groups.items()
    }
    shown = [charts.pop(name) for name in _FIRST if name in charts]
    parts.append(f'<h3>Training</h3><div class="charts">{"".join(shown)}</div>')
    rest = f'<div class="charts">{"".join(charts[name] for name in sorted(charts))}</div>'
    parts.append(f"<details><summary>All other metrics ({len(charts)})</summary>{rest}</details>")
    for name in ("config.yaml", "versions.json"):
        path = folder / name
        content = (
            f"<pre>{text(path.read_text(encoding='utf-8', errors='replace'))}</pre>"
            if path.is_file()
            else "<p>The run's folder has none.</p>"
        )
        parts.append(f"<details><summary>{name}</summary>{content}</details>")
    return "<section>" + "\n".join(parts) + "</section>"


def _grouped(curves: Mapping[str, Curve]) -> dict[str, list[str]]:
    """Chart → its lines: a held-out figure shares a chart with the training metric it measures."""
    terms = [name for name in curves if name.startswith("eval/loss/")]
    groups = {name: [name] for name in curves if not name.startswith("eval/")}
    for name in curves:
        if not name.startswith("eval/"):
            continue
        # With a single term, the loss is that term.
        same = "loss" if terms == [name] else name.removeprefix("eval/")
        if same in groups:
            groups[same].append(name)
        else:
            groups[name] = [name]
    groups.pop("compiles", None)
    return groups


def _figure(title: str, series: Sequence[Curve], names: Sequence[str], across: str) -> str:
    lasts = [f"{curve[-1][1]:.4g}" for curve in series]
    if len(series) == 1:
        legend = f"last {lasts[0]}"
    else:
        labels = ["held out" if name.startswith("eval/") else "training" for name in names]
        legend = "last " + "".join(
            f'<i class="s{i}"></i>{label} {last}'
            for i, (label, last) in enumerate(zip(labels, lasts, strict=True))
        )
    svg = line_chart(series, title, across, _UNITS.get(title, title))
    return _captioned(title, legend, svg)


def _held_out(curves: Mapping[str, Curve], across: str) -> str:
    rows = []
    for name, curve in curves.items():
        (first, before), (last, after) = curve[0], curve[-1]
        start = f"{before:.4g}" if first == 0 else "not measured"
        end = f"{after:.4g}" if last > 0 else "not yet"
        rows.append((name.removeprefix("eval/"), start, end, f"{last:g}"))
    return table(("figure", "before", "after", across), rows, numbers=(1, 2, 3))


def _evaluation(path: pathlib.Path, across: str) -> str:
    """A reward model's last evaluation: calibration, scores, attributes, sources."""
    values = read_json(path)
    figures, tables = [], []
    try:
        if values.get("calibration"):
            bins = values["calibration"]
            low = 0.5 if values["objective"] == "pairs" else 0.0
            curve = [(row["predicted"], row["observed"]) for row in bins]
            ends = [[(row["predicted"], row[end]) for end in ("low", "high")] for row in bins]
            svg = line_chart(
                [curve, [(low, low), (1.0, 1.0)], *ends],
                "calibration",
                "predicted probability",
                "observed",
                x_ticks=value_ticks(low, 1.0),
            )
            legend = '<i class="s0"></i>observed <i class="s1"></i>perfect'
            figures.append(_captioned("calibration", legend, svg))
        if "histogram" in values:
            edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
            svg = bar_chart(edges, list(counts.values()), "scores", "score", "answers")
            legend = " ".join(f'<i class="s{i}"></i>{text(name)}' for i, name in enumerate(counts))
            figures.append(_captioned("scores", legend, svg))
        for name in ("attributes", "sources"):
            rows = values.get(name, [])
            if rows:
                heads = list(rows[0])
                cells = [
                    [f"{row[h]:.4g}" if isinstance(row[h], float) else row[h] for h in heads]
                    for row in rows
                ]
                tables.append(table(heads, cells, numbers=range(1, len(heads))))
        title = f"Scores of held-out answers, {across} {values['step']:g}"
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not what a run of `jaxalign reward` writes") from error
    return f'<h3>{title}</h3><div class="charts">{"".join(figures)}</div>{"".join(tables)}'


def _captioned(title: str, legend: str, svg: str) -> str:
    return f"<figure><figcaption>{text(title)} <span>{legend}</span></figcaption>{svg}</figure>"
