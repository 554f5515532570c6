"""An explained step on the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from jaxalign.commands.explain.explain import Explanation
from jaxalign.commands.explain.rows import SHARE
from jaxalign.commands.report.data import CLOSE, OPEN, marked, printable
from jaxalign.run.replay import Replayed

_FIGURES = (
    *("loss", "score", "reward", "kl", "advantage", "largest ratio", "clipped"),
    *("rewards/margins", "margin", "rewards/chosen", "rewards/rejected", "accuracy"),
    *("logps/chosen", "logps/rejected", "mse", "best", "probability"),
)
"""Figures of a row that a table shows, in this order; the JSON file has all."""

_CHANGES, _LINES = 12, 12


def columns_of(explanation: Explanation) -> list[str]:
    """The figures to show in a table of rows."""
    there = {name for row in explanation.rows for name in row.figures}
    known = [name for name in _FIGURES if name in there]
    scores = sorted(name for name in there if name.startswith("score/"))
    return [*known, *(scores if len(scores) > 1 else ()), "trained", "tokens", SHARE]


def cell(name: str, value: float) -> str:
    """A figure for people."""
    if math.isnan(value):
        return "–"
    if name == SHARE:
        return f"{value:.1%}"
    return f"{value:.4g}"


def figure(value: Any) -> str:
    """A metric, for display; non-finite values are recorded as text."""
    return "–" if value is None else f"{float(value):.5g}"


def bits(explanation: Explanation) -> list[str]:
    """Sentences on whether the replay was bitwise equal to the record."""
    e = explanation
    where = f"step {e.step}" if e.start + 1 == e.step else f"steps {e.start + 1} to {e.step}"
    begin = f"checkpoint {e.start}" if e.start else "the initial state"
    compared = sum(step.compared for step in e.replayed)
    if e.same:
        first = f"{where}, replayed from {begin}: all {compared} metrics have the recorded bits."
    else:
        first = f"{where}, replayed from {begin}: not the recorded bits."
    lines = [first, *difference_lines(e.replayed)]
    if e.notes:
        lines.append("Bits cannot be promised: " + "; ".join(e.notes))
    return lines


def difference_lines(replayed: Sequence[Replayed]) -> list[str]:
    """The differences from the record, one line per step."""
    lines = []
    for step in replayed:
        if not step.compared:
            lines.append(f"step {step.step}: nothing is recorded of it")
        if step.differences:
            first = step.differences[0]
            lines.append(
                f"step {step.step}: {len(step.differences)} of {step.compared} metrics differ; "
                f"{first.name} was {first.recorded!r} and is {first.replayed!r}"
            )
    return lines


def show(explanation: Explanation, colour: bool) -> str:
    """The explanation as text; with `colour` trained text is green, else in ⟦ ⟧."""
    e = explanation
    lines = [f"{printable(e.run)}, {e.algorithm}, step {e.step}", ""]
    lines += [*map(printable, bits(e)), ""]
    lines.append("What stands out:" if e.findings else "Nothing stands out.")
    lines += [f"  {printable(finding.message)}" for finding in e.findings]
    if e.previous is not None:
        lines += ["", f"Against step {e.previous}:"]
        shown = [(printable(name), pair) for name, pair in e.changes.items()][:_CHANGES]
        width = max(len(name) for name, _ in shown)
        for name, (before, now) in shown:
            lines.append(f"  {name.ljust(width)}  {figure(before):>10} → {figure(now)}")
    if e.repeated is not None:
        lines.append(f"  {e.repeated} of its rows were in the batch before, too")
    if e.rows:
        lines += ["", *_table(e)]
    for number, documents in e.texts.items():
        row = e.rows[number]
        for document, texts in zip(row.documents, documents, strict=True):
            name = f", {document.name}" if document.name else ""
            lines.append(f"--- {printable(row.name)}{name}")
            runs: list[tuple[str, bool]] = []
            for text, trained in zip(texts, document.trained.tolist(), strict=True):
                if runs and runs[-1][1] == trained:
                    text = runs.pop()[0] + text
                runs.append((text, trained))
            lines.append(marked(runs, colour))
    if e.texts and not colour:
        lines.append(f"(trained tokens are in {OPEN} {CLOSE})")
    return "\n".join([*lines, ""])


def _table(e: Explanation) -> list[str]:
    """The rows that stand out, and those with the largest gradient."""
    names = columns_of(e)
    chosen = e.order[:_LINES]
    body = [
        [printable(e.rows[n].name), *(cell(k, e.rows[n].figures.get(k, math.nan)) for k in names)]
        for n in chosen
    ]
    table = [["", *names], *body]
    widths = [max(len(line[i]) for line in table) for i in range(len(names) + 1)]
    lines = [
        "  ".join(
            [first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:], strict=True))]
        ).rstrip()
        for first, *rest in table
    ]
    if len(e.rows) > len(chosen):
        lines.append(f"({len(e.rows) - len(chosen)} more rows in the page)")
    return lines
