"""Explains a step: replays it, measures its rows, and compares it with the steps before."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign.commands.explain.findings import WATCHED, Finding, findings
from jaxalign.commands.explain.measure import kind_of
from jaxalign.commands.explain.rows import GRADIENT, Row, StepWatcher, rows_of
from jaxalign.commands.explain.units import Document
from jaxalign.run.replay import Replay, Replayed, open_replay

_ABOUT_UPDATES = ("loss", "grad_norm", "policy/approxkl_avg", "policy/clipfrac_avg", "bad_steps")
_MOST_BYTES = 4  # the most bytes of a character in UTF-8, and so the most tokens that it takes


class Explanation(NamedTuple):
    """The explanation of a step.

    Attributes:
      run: name of the run's folder.
      algorithm: the run's algorithm.
      step: its number.
      start: the step that the replay began after; 0: the initial state.
      replayed: the replayed steps; the last is the step itself.
      notes: why the replay may not be bitwise equal.
      previous: the recorded step before it, or None.
      changes: metric → (its value in that step, its value in this one).
      repeated: how many of its rows were also in the previous batch; None if rows are unknown.
      updates: the metrics of each update.
      rows: the rows it trained on.
      findings: what stands out.
      texts: row → the texts of its documents' tokens.
    """

    run: str
    algorithm: str
    step: int
    start: int
    replayed: list[Replayed]
    notes: list[str]
    previous: int | None
    changes: dict[str, tuple[Any, Any]]
    repeated: int | None
    updates: list[dict[str, float]]
    rows: list[Row]
    findings: list[Finding]
    texts: dict[int, list[list[str]]]

    @property
    def same(self) -> bool:
        """Whether every replayed step has the recorded bits."""
        return all(step.compared and not step.differences for step in self.replayed)

    @property
    def order(self) -> list[int]:
        """Rows in display order: first those with text, then those with the largest gradient."""
        rest = sorted(range(len(self.rows)), key=lambda n: -self.rows[n].figures.get(GRADIENT, 0.0))
        return list(dict.fromkeys([*self.texts, *rest]))


def explain(
    folder: str | os.PathLike[str], step: int, *, show: int = 8, allow_changes: bool = False
) -> Explanation:
    """Explains a step of a run, without changing anything in its folder.

    Args:
      folder: the run's folder.
      step: the step, from 1.
      show: the number of rows to decode as text: first those that stand out, then those with the
        largest gradient.
      allow_changes: explain even if the run's inputs have changed.

    Raises:
      ValueError: no run there, no such step, or inputs that have changed since.
    """
    with open_replay(os.fspath(folder), step, allow_changes=allow_changes) as replay:
        start = replay.start_before(step)
        count = "1 step" if step == start + 1 else f"{step - start} steps"
        print(f"replaying {count}, from {_place(start)}", flush=True)
        watcher = StepWatcher(kind_of(replay.config, replay.built.parts), replay.built.mesh)
        replayed = replay.run(start, step, watcher)
        rows = rows_of(watcher, replay.built, step)
        metrics = replay.past.metrics | {step: replayed[-1].metrics}
        found = findings(step, metrics, rows)
        shown = _chosen(rows, found, show)
        tok = replay.built.tok
        texts = {n: [pieces(tok, d.ids) for d in rows[n].documents] for n in shown}
        previous = max((number for number in replay.past.metrics if number < step), default=None)
        return Explanation(
            replay.past.folder.resolve().name,
            type(replay.config).algorithm,
            step,
            start,
            replayed,
            replay.notes,
            previous,
            _changes(replay.past.metrics.get(previous or 0, {}), metrics[step]),
            _repeated(replay, step),
            [{n: u[n] for n in _ABOUT_UPDATES if n in u} for u in watcher.logged],
            rows,
            found,
            texts,
        )


def _place(start: int) -> str:
    return f"checkpoint {start}" if start else "the initial state"


def _chosen(rows: list[Row], found: Iterable[Finding], count: int) -> list[int]:
    """Numbers of the rows to show."""
    first = [finding.row for finding in found if finding.row is not None]
    rest = sorted(range(len(rows)), key=lambda n: -rows[n].figures[GRADIENT])
    return list(dict.fromkeys([*first, *rest]))[:count]


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    names = [name for name in (*WATCHED, *now) if name in now]
    names = [name for name in names if name != "compiles" and not name.startswith("time/")]
    return {name: (before.get(name), now[name]) for name in names}


def _repeated(replay: Replay, step: int) -> int | None:
    batches = replay.built.task.batches
    now = batches.rows_of(step - 1)
    if not now or step < 2:
        return None
    return len(set(now) & set(batches.rows_of(step - 2)))


def pieces(tok: Any, ids: np.ndarray) -> list[str]:
    """The text that each token adds; special tokens are written out.

    A character of several tokens is the last one's; what is no character is shown as "\ufffd".
    """

    def decode(some: list[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tok.decode(some, **options))

    listed, result = ids.tolist(), []
    # Some tokenizers write a token differently at the start, so the one before is decoded too.
    before, first = 0, 0
    for end in range(1, len(listed) + 1):
        known, text = decode(listed[before:first]), decode(listed[before:end])
        waits = text.endswith("\ufffd") and end - first < _MOST_BYTES and end < len(listed)
        if waits:
            result.append("")
            continue
        result.append(text[len(known) :] if text.startswith(known) else decode(listed[first:end]))
        before, first = first, end
    return result


def as_values(explanation: Explanation) -> dict[str, Any]:
    """The explanation as JSON-able values, with null for non-finite numbers."""
    e = explanation
    return {
        "run": e.run,
        "algorithm": e.algorithm,
        "step": e.step,
        "replayed_from": e.start,
        "same_bits": e.same,
        "notes": e.notes,
        "replayed": [
            {
                "step": replayed.step,
                "compared": replayed.compared,
                "differences": [difference._asdict() for difference in replayed.differences],
            }
            for replayed in e.replayed
        ],
        "metrics": e.replayed[-1].metrics,
        "step_before": e.previous,
        "changes": {name: list(pair) for name, pair in e.changes.items()},
        "rows_repeated": e.repeated,
        "updates": [_plain(update) for update in e.updates],
        "findings": [finding._asdict() for finding in e.findings],
        "rows": [_row_values(e, number) for number in range(len(e.rows))],
    }


def _row_values(e: Explanation, number: int) -> dict[str, Any]:
    row = e.rows[number]
    values: dict[str, Any] = {"origin": row.origin, "place": row.place}
    values["figures"] = _plain(row.figures)
    if number in e.texts:
        values["documents"] = [
            _document_values(document, texts)
            for document, texts in zip(row.documents, e.texts[number], strict=True)
        ]
    return values


def _document_values(document: Document, texts: list[str]) -> dict[str, Any]:
    return {
        "name": document.name,
        "ids": document.ids.tolist(),
        "tokens": texts,
        "trained": document.trained.tolist(),
        "values": {k: [_number(x) for x in v.tolist()] for k, v in document.values.items()},
    }


def _plain(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: _number(value) for name, value in figures.items()}


def _number(value: float) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None
