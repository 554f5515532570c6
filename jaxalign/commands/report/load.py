"""Loads a run's folder for a report, and lists what is missing."""

from __future__ import annotations

import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxalign.commands.report.metrics import Curve, Metrics, scan_metrics
from jaxalign.data.bounds import parse_json, read_json_file
from jaxalign.run.changes import flat_values
from jaxalign.run.config.runs import RUNS
from jaxalign.run.config.yaml import read_yaml
from jaxalign.run.lock import LOCK, STALE_SECONDS
from jaxalign.run.summary import summary

MOST_RUNS = 24
"""More runs on one page can neither be told apart nor be kept below its size."""

_MOST_DAMAGED = 5
_PLACES = 3  # characters of a folder's name to tell runs apart


class Run(NamedTuple):
    """One run, as read from its folder.

    Attributes:
      number: its position on the page, from 0; determines the colour.
      name: its name, distinct from other runs'.
      folder: the run's folder.
      algorithm: "sft", …; None if the configuration is missing.
      metrics: of `metrics.jsonl`.
      options: option → value, as text; {} without configuration.
      state: "finished", "running", "stopped at step 3 of 10" or the like.
      total: steps of the whole run; None if `run.json` is missing.
      evaluation: contents of `evaluation.json`, or None.
      rollouts: lines of `rollouts.jsonl`.
      memory: `device_bytes` and `host_bytes` at their peaks, as far as they are known.
      missing: sentences on what the page lacks.
    """

    number: int
    name: str
    folder: pathlib.Path
    algorithm: str | None
    metrics: Metrics
    options: dict[str, str]
    state: str
    total: int | None
    evaluation: Mapping[str, Any] | None
    rollouts: list[Mapping[str, Any]]
    memory: Mapping[str, float]
    missing: list[str]

    @property
    def curves(self) -> dict[str, Curve]:
        """Metric → (step, value)."""
        return self.metrics.curves

    @property
    def across(self) -> str:
        """The name of a step of the run."""
        return "iteration" if self.algorithm == "ppo" else "step"

    @property
    def done(self) -> int:
        """The last step that is recorded."""
        return last_step(self.metrics)

    @property
    def seconds(self) -> float:
        """The time of all recorded steps."""
        return sum(value for _, value in self.curves.get("time/step", []) if math.isfinite(value))

    def typical(self, name: str) -> float | None:
        """The median of a metric, without the first step, which compiles."""
        values = [value for _, value in self.curves.get(name, []) if math.isfinite(value)]
        return statistics.median(values[1:] or values) if values else None

    def result(self) -> str:
        """The run's result in one line; "" if nothing is known."""
        held_out = {k[5:]: curve for k, curve in self.curves.items() if k.startswith("eval/")}
        before = {k: curve[0][1] for k, curve in held_out.items() if curve[0][0] == 0}
        after = {k: curve[-1][1] for k, curve in held_out.items() if curve[-1][0] > 0}
        rows: dict[float, dict[str, float]] = {}
        for name, curve in self.curves.items():
            for step, value in curve:
                rows.setdefault(step, {})[name] = value
        return summary(before, after, [rows[step] for step in sorted(rows)])


def last_step(metrics: Metrics) -> int:
    """The last step of all curves; 0 if there are none."""
    return int(max((curve[-1][0] for curve in metrics.curves.values()), default=0))


def load_runs(folders: Sequence[pathlib.Path]) -> list[Run]:
    """The runs of some folders, in their order, with names that differ."""
    names = _names(folders)
    return [
        _load(number, name, folder)
        for number, (name, folder) in enumerate(zip(names, folders, strict=True))
    ]


def find_runs(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder itself if it is a run, else the runs in it, in the order they were started.

    Raises:
      ValueError: there is none.
    """
    if _is_run(folder):
        return [folder]

    def started(run: pathlib.Path) -> tuple[float, str]:
        config = run / "config.yaml"  # written once, at the start
        return (config.stat().st_mtime if config.is_file() else math.inf, run.name)

    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = sorted((path for path in inside if path.is_dir() and _is_run(path)), key=started)
    if not found:
        raise ValueError(
            f"{folder}: no metrics.jsonl in it or in a folder of it; give the folder of a run "
            f"(run.folder) or of a pipeline"
        )
    return found


def _is_run(folder: pathlib.Path) -> bool:
    """Whether a folder is a run; during set-up it has `run.json` before any metrics."""
    return any((folder / name).is_file() for name in ("metrics.jsonl", "run.json"))


def _names(folders: Sequence[pathlib.Path]) -> list[str]:
    """The shortest path endings that distinguish the runs."""
    paths = [folder.resolve().parts for folder in folders]
    for places in range(1, _PLACES + 1):
        names = [os.sep.join(parts[-places:]) for parts in paths]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _load(number: int, name: str, folder: pathlib.Path) -> Run:
    missing: list[str] = []
    metrics = _metrics(folder / "metrics.jsonl", missing)
    values = _part(folder / "config.yaml", read_yaml, missing) or {}
    record = _part(folder / "run.json", read_json_file, missing) or {}
    total = record.get("total") if isinstance(record, Mapping) else None
    total = total if isinstance(total, int) else None
    _part(folder / "versions.json", read_json_file, missing)
    algorithm = next((name for name in RUNS if name in values), None)
    path = folder / "evaluation.json"
    evaluation = _part(path, read_json_file, missing) if path.is_file() else None
    rollouts = _rollouts(folder / "rollouts.jsonl", missing)
    if algorithm == "ppo" and not rollouts:
        missing.append("No sampled answers: dump_every: 1 records some of every iteration.")
    if metrics.curves and not any(key.startswith("eval/") for key in metrics.curves):
        missing.append("No held-out figures: give data.eval (or data.validation).")
    return Run(
        number=number,
        name=name,
        folder=folder,
        algorithm=algorithm,
        metrics=metrics,
        options={k: str(v) for k, v in flat_values(values).items()},
        state=_state(folder, last_step(metrics), total),
        total=total,
        evaluation=evaluation,
        rollouts=rollouts,
        memory=_memory(folder / "usage.json", missing),
        missing=missing,
    )


def _part(path: pathlib.Path, read: Callable[[pathlib.Path], Any], missing: list[str]) -> Any:
    """A file's contents; None, and a sentence, if it is missing or damaged."""
    if not path.is_file():
        missing.append(f"{path.name} is missing.")
        return None
    try:
        return read(path)
    except (ValueError, OSError) as error:
        missing.append(f"{path.name} cannot be read: {str(error).splitlines()[0][:200]}")
        return None


def _metrics(path: pathlib.Path, missing: list[str]) -> Metrics:
    if not path.is_file():
        missing.append("metrics.jsonl is missing: no step is done yet, or it was moved away.")
        return Metrics({}, False)
    found = scan_metrics(path)
    if found.damaged:
        first = ", ".join(map(str, found.damaged[:_MOST_DAMAGED]))
        more = " …" if len(found.damaged) > _MOST_DAMAGED else ""
        missing.append(
            f"{len(found.damaged)} damaged lines of metrics.jsonl are left out: {first}{more}."
        )
    if found.cut:
        missing.append("The last line of metrics.jsonl is cut off and left out.")
    if not found.curves:
        missing.append("metrics.jsonl has no metrics yet; wait for the run's first step.")
    return found


def _memory(path: pathlib.Path, missing: list[str]) -> Mapping[str, float]:
    found = _part(path, read_json_file, missing) if path.is_file() else {}
    values = found.items() if isinstance(found, Mapping) else ()
    return {k: float(v) for k, v in values if isinstance(v, int | float)}


def _rollouts(path: pathlib.Path, missing: list[str]) -> list[Mapping[str, Any]]:
    if not path.is_file():
        return []
    rows, lost = [], 0
    # Split only at "\n": an answer may contain other line separators, such as U+2028.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if not line:
            continue
        try:
            row = parse_json(line)
            if not isinstance(row["step"], int):
                raise ValueError(row)
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            lost += 1
    if lost:
        missing.append(f"{lost} damaged lines of rollouts.jsonl are left out.")
    return rows


def _is_held(folder: pathlib.Path) -> bool:
    """Whether a process still renews the folder's lock; a killed process's lock goes stale."""
    try:
        return (folder / LOCK).stat().st_mtime > time.time() - STALE_SECONDS
    except OSError:
        return False


def _state(folder: pathlib.Path, done: int, total: int | None) -> str:
    if _is_held(folder):
        return f"running, step {done} of {total}" if total else "running"
    if total is None:
        return f"{done} steps"
    if done >= total:
        return "finished"
    if (folder / "model").is_dir():
        return f"ended early, at step {done} of {total}"
    return f"stopped at step {done} of {total}"
