"""A reward model's last evaluation: calibration, scores, attributes, sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.commands.report.axes import short, text
from jaxalign.commands.report.charts import bar_chart, line_chart, value_ticks
from jaxalign.commands.report.load import Run
from jaxalign.commands.report.page import scrolling, table

_MOST_ROWS = 200


def evaluation_section(run: Run) -> str:
    """The section of `evaluation.json`; of a damaged one, a sentence. "" without the file."""
    if run.evaluation is None:
        return ""
    try:
        return _section(run.evaluation, run.across)
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError):
        return (
            '<p class="note">evaluation.json is damaged: not what a run of `jaxalign reward` '
            "writes. The next evaluation of the run replaces it.</p>"
        )


def _section(values: Mapping[str, Any], across: str) -> str:
    figures, tables = [], []
    if values.get("calibration"):
        figures.append(_calibration(values))
    if "histogram" in values:
        edges, counts = values["histogram"]["edges"], values["histogram"]["counts"]
        svg = bar_chart(edges, list(counts.values()), "scores", "score", "answers")
        legend = " ".join(f'<i class="s{i}"></i>{text(name)}' for i, name in enumerate(counts))
        figures.append(_captioned("Scores of held-out answers", legend, svg))
    for name in ("attributes", "sources"):
        rows = values.get(name, [])
        if rows:
            heads = list(rows[0])
            cells = [
                [short(row[h]) if isinstance(row[h], float) else row[h] for h in heads]
                for row in rows[:_MOST_ROWS]
            ]
            made = table(heads, cells, numbers=range(1, len(heads)))
            tables.append(f"<h4>{name.capitalize()}</h4>{scrolling(made, name)}")
            if len(rows) > _MOST_ROWS:
                tables.append(f'<p class="note">{len(rows) - _MOST_ROWS} more are left out.</p>')
    title = f"Held-out evaluation at {across} {values['step']:g}"
    return f'<h3>{title}</h3><div class="charts">{"".join(figures)}</div>{"".join(tables)}'


def _calibration(values: Mapping[str, Any]) -> str:
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
    return _captioned("Calibration", legend, f'<div class="calibration">{svg}</div>')


def _captioned(title: str, legend: str, svg: str) -> str:
    caption = f'<b>{text(title)}</b> <span class="lasts">{legend}</span>'
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"
