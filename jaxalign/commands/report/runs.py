"""Compares runs, or the stages of a pipeline, on one self-contained HTML page.

It has the curves of `metrics.jsonl` overlaid, held-out metrics, KL against reward, sampled answers,
throughput, findings with remedies, and configurations. For a quickstart it also has its metrics,
win rates and answers (`quickstart`).
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Mapping, Sequence

from jaxalign.commands.report import compare
from jaxalign.commands.report.advice import SERIOUS, warnings_of
from jaxalign.commands.report.axes import text
from jaxalign.commands.report.curves import Line, figure
from jaxalign.commands.report.evaluation import evaluation_section
from jaxalign.commands.report.frontier import frontier_section
from jaxalign.commands.report.load import MOST_RUNS, Run, find_runs, load_runs
from jaxalign.commands.report.metrics import Curve, Metrics, read_metrics
from jaxalign.commands.report.names import COST, OTHER, RESULTS, SECTIONS, name_of, order_of
from jaxalign.commands.report.page import page, write_page
from jaxalign.commands.report.quickstart import summary_sections
from jaxalign.commands.report.samples import samples_section
from jaxalign.data.remote import fetch, is_address

__all__ = ["Curve", "Metrics", "find_runs", "make_page", "read_metrics", "write_report"]

KIND = "report"

_POINTS = 90_000  # of all curves: a point takes about 11 bytes of the page
_FEWEST_POINTS, _MOST_POINTS = 30, 240  # of a curve
_FILES = 300_000  # characters of all configurations

Folder = str | os.PathLike[str]


def write_report(
    folders: Folder | Sequence[Folder], out: Folder | None = None, overwrite: bool = False
) -> pathlib.Path:
    """Writes the page of runs or a pipeline; returns the file.

    Args:
      folders: a run's folder, or one whose sub-folders are runs, or several of either, also in
        buckets.
      out: HTML file to write; by default `report.html`, in the folder if it is only one, else here.
      overwrite: also replace a file that is not a report.

    Raises:
      ValueError: no run there, the file is not a report, or no file is named for a folder in a
        bucket.
    """
    every = _listed(folders)
    if out is None and any(map(is_address, every)):
        named = ", ".join(os.fspath(each) for each in every)
        raise ValueError(f"{named}: the page is not written there; name a file: --out")
    default = pathlib.Path(every[0] if len(every) == 1 else ".") / "report.html"
    path = default if out is None else pathlib.Path(out)
    return write_page(path, make_page(every), KIND, overwrite)


def make_page(folders: Folder | Sequence[Folder]) -> str:
    """The page as text, well-formed as HTML and as XML; see `write_report`."""
    paths = [
        _fetch(os.fspath(folder)) if is_address(folder) else pathlib.Path(folder)
        for folder in _listed(folders)
    ]
    places = list(dict.fromkeys(run for path in paths for run in find_runs(path)))
    runs = load_runs(places[:MOST_RUNS])
    title = paths[0].resolve().name if len(paths) == 1 else f"{len(runs)} runs"
    body = [_head(runs, len(places) - len(runs))]
    whole = [path for path in paths if (path / "summary.json").is_file()]
    body += [_summary(path, len(whole) > 1) for path in whole]
    body.append(_findings(runs))
    most = _points_a_curve(runs)
    for algorithm in dict.fromkeys(run.algorithm for run in runs):
        group = [run for run in runs if run.algorithm == algorithm]
        body.append(_group(algorithm, group, most))
    body += [_cost(runs), _configuration(runs), _tables(runs)]
    return page(title, body, kind=KIND, script=True)


def _fetch(address: str) -> pathlib.Path:
    """A local copy of runs in a bucket, without the large files."""
    large = {"checkpoints", "model"}
    return fetch(address, "folder", accept=lambda name: large.isdisjoint(name.split("/")[:2]))


def _listed(folders: Folder | Sequence[Folder]) -> Sequence[Folder]:
    return [folders] if isinstance(folders, str | os.PathLike) else list(folders)


def _points_a_curve(runs: Sequence[Run]) -> int:
    """Points per curve, so that the page stays small. Noisy curves count twice."""
    curves = 2 * sum(len(run.curves) for run in runs)
    return min(_MOST_POINTS, max(_FEWEST_POINTS, _POINTS // max(1, curves)))


# --- sections ------------------------------------------------------------------------------------


def _head(runs: Sequence[Run], left_out: int) -> str:
    """Overview, links, and a button a run."""
    parts = [compare.overview(runs)]
    if left_out:
        parts.append(
            f'<p class="note">{left_out} more runs are left out: a page takes {MOST_RUNS}. Name '
            "those to compare.</p>"
        )
    algorithms = dict.fromkeys(run.algorithm for run in runs)
    links = [("findings", "What stands out")]
    links += [(_anchor(name), compare.title_of(name)) for name in algorithms]
    links += [("cost", "Cost"), ("configuration", "Configuration"), ("tables", "Tables")]
    shown = "".join(f'<a href="#{anchor}">{text(name)}</a>' for anchor, name in links)
    parts.append(f'<nav aria-label="sections">{shown}</nav>')
    if len(runs) > 1:
        buttons = "".join(
            f'<button type="button" value="{run.number}" aria-pressed="true">'
            f"{compare.labelled(run)}</button>"
            for run in runs
        )
        parts.append(
            '<div class="runs" role="group" aria-label="runs shown" hidden="hidden">'
            f"{buttons}</div>"
        )
    return "".join(parts)


def _anchor(algorithm: str | None) -> str:
    return f"of-{algorithm or 'unknown'}"


def _summary(path: pathlib.Path, several: bool) -> str:
    try:
        return summary_sections(path / "summary.json", several)
    except ValueError as error:
        return f'<p class="note">{text(str(error).splitlines()[0])}</p>'


def _findings(runs: Sequence[Run]) -> str:
    """What stands out, and what the folders lack."""
    items = []
    for run in runs:
        label = compare.labelled(run)
        for found in warnings_of(run):
            word = "Serious" if found.level == SERIOUS else "Worth a look"
            items.append(
                f'<li class="{found.level}"><p><span class="level">{word} · </span>{label}</p>'
                f"<p><b>{text(found.message)}</b></p><p>{text(found.remedy)}</p></li>"
            )
    for run in runs:
        if run.missing:
            lines = "".join(f"<p>{text(line)}</p>" for line in run.missing)
            items.append(
                f'<li class="lacks"><p><span class="level">Missing · </span>'
                f"{compare.labelled(run)}</p>{lines}</li>"
            )
    inner = f'<ul class="findings">{"".join(items)}</ul>' if items else "<p>Nothing.</p>"
    return f'<h2 id="findings">What stands out</h2>{inner}'


def _group(algorithm: str | None, runs: Sequence[Run], most: int) -> str:
    """All charts of the runs of one algorithm."""
    names = "".join(
        f'<span class="last" data-run="{run.number}">{compare.labelled(run)}</span>' for run in runs
    )
    parts = [
        f'<h2 id="{_anchor(algorithm)}">{text(compare.title_of(algorithm))}</h2>'
        f'<p class="lasts">{names}</p>'
    ]
    charts = _charts(runs, most)
    if not charts:
        parts.append('<p class="note">There are no curves yet.</p>')
    if any(key.startswith("eval/") for run in runs for key in run.curves):
        parts.append('<p class="note">Held-out figures are dashed.</p>')
    for section in SECTIONS[:-2]:
        if section in charts:
            parts.append(f'<h3>{section}</h3><div class="charts">{"".join(charts[section])}</div>')
        if section == RESULTS:
            parts.append(frontier_section(runs))
    for run in runs:
        before_after = compare.held_out(run)
        if before_after:
            title = "Held out" if len(runs) == 1 else f"Held out: {compare.labelled(run)}"
            parts.append(f"<h3>{title}</h3>{before_after}")
        evaluation = evaluation_section(run)
        if evaluation:
            parts.append(f'<div data-run="{run.number}">{evaluation}</div>')
    parts.append(samples_section(runs))
    for section in (COST, OTHER):
        if section in charts:
            inner = f'<div class="charts">{"".join(charts[section])}</div>'
            count = len(charts[section])
            parts.append(f"<details><summary>{section} ({count})</summary>{inner}</details>")
    return "<section>" + "\n".join(parts) + "</section>"


def _charts(runs: Sequence[Run], most: int) -> dict[str, list[str]]:
    """Section → its charts; a held-out metric shares a chart with its training metric."""
    grouped: dict[str, list[Line]] = {}
    for run in runs:
        for key, chart in _chart_of(run.curves).items():
            line = Line(run.name, run.number, run.curves[key], key.startswith("eval/"))
            grouped.setdefault(chart, []).append(line)
    charts: dict[str, list[str]] = {}
    for key in sorted(grouped, key=order_of):
        name = name_of(key)
        made = figure(name, key, grouped[key], runs[0].across, most)
        charts.setdefault(name.section, []).append(made)
    return charts


def _chart_of(curves: Mapping[str, Curve]) -> dict[str, str]:
    """Metric → the metric whose chart it is drawn in."""
    terms = [name for name in curves if name.startswith("eval/loss/")]
    places = {name: name for name in curves if not name.startswith("eval/")}
    places.pop("compiles", None)
    for name in curves:
        if name.startswith("eval/"):
            # With a single term, the loss is that term.
            same = "loss" if terms == [name] else name.removeprefix("eval/")
            places[name] = same if same in places else name
    return places


def _cost(runs: Sequence[Run]) -> str:
    made = compare.costs(runs) or '<p class="note">No times were recorded.</p>'
    note = (
        "Medians over the steps, without the first, which compiles. Tokens are real ones, without "
        "padding; in PPO those of prompts and answers."
    )
    return f'<h2 id="cost">Throughput and memory</h2>{made}<p class="note">{note}</p>'


def _configuration(runs: Sequence[Run]) -> str:
    """What differs, and every file that says what was run."""
    parts = ['<h2 id="configuration">Configuration</h2>', compare.differences(runs)]
    most = _FILES // (2 * len(runs))
    for run in runs:
        inner = []
        for name in ("config.yaml", "versions.json"):
            path = run.folder / name
            if not path.is_file():
                inner.append(f"<p>{name}: the run's folder has none.</p>")
                continue
            content = path.read_text(encoding="utf-8", errors="replace")
            more = "" if len(content) <= most else f"\n… {len(content) - most:,} more characters"
            shown = text(content[:most] + more)
            inner.append(f'<h3>{name}</h3><pre tabindex="0">{shown}</pre>')
        label = compare.labelled(run)
        parts.append(f"<details><summary>{label}</summary>{''.join(inner)}</details>")
    return "".join(parts)


def _tables(runs: Sequence[Run]) -> str:
    made = compare.figures(runs)
    return (
        '<h2 id="tables">Tables</h2><details><summary>Every curve in numbers</summary>'
        f"{made}</details>"
    )
