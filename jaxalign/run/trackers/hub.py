"""All trackers of a run: starts or continues them, sends them the run's metrics, closes them."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.data.bounds import read_json_file
from jaxalign.data.paths import replace_text
from jaxalign.parallel import distributed
from jaxalign.run.metrics import METRICS, parse_row
from jaxalign.run.tasks.rollout_log import HISTOGRAMS, SAMPLES
from jaxalign.run.trackers.base import TrackedRun
from jaxalign.run.trackers.sender import Sender
from jaxalign.run.trackers.table import load
from jaxalign.run.trackers.tail import Tail

IDENTITIES = "trackers.json"
"""File in a run's folder: each tracker's id of the run, and what it may lack."""

_SAMPLE = ("prompt", "answer", "score", "finished", "trained")


def open_trackers(
    names: Sequence[str],
    *,
    folder: pathlib.Path,
    project: str,
    config: Mapping[str, Any],
    done: int,
    optional: bool,
) -> Trackers:
    """Starts the trackers of a run, or continues those of an earlier start.

    A continued tracker gets each number once: numbers of repeated steps that it already has are
    neither sent again nor changed. A tracker that is new to the run, or failed in an earlier start,
    first gets the missing numbers from `metrics.jsonl`. Only process 0 writes; on the others the
    result does nothing. Call this before `metrics.jsonl` is opened for writing.

    Args:
      names: the installed trackers among `run.trackers`.
      folder: the run's folder.
      project: the project under which trackers group runs.
      config: option → value, flat.
      done: the step after which the run resumes; 0: a new run.
      optional: print a message if a tracker does not start, instead of raising an error.

    Raises:
      ValueError: a tracker does not start.
    """
    with distributed.fail_together("opening the trackers"):
        if not distributed.is_main():
            return Trackers(folder, [], {}, done)
        known = _read_identities(folder / IDENTITIES)
        if not names and not known:
            return Trackers(folder, [], {}, done)
        rows = _rows(folder / METRICS)
        # The last step of an earlier start, even beyond the checkpoint.
        reached = {name: row["step"] for row in rows for name in row}
        kept = [row for row in rows if row["step"] <= done] if done else []
        senders: list[Sender] = []
        for name in names:
            entry = known.get(name, {})
            run = TrackedRun(
                folder, project, folder.resolve().name, config, entry.get("identity"), done
            )
            try:
                tracker = load(name)(run)
            except Exception as error:
                message = f"run.trackers: {name} does not begin: {type(error).__name__}: {error}"
                if not optional:
                    raise ValueError(
                        f"{message}; run.trackers_optional=true trains without it"
                    ) from error
                print(f"{message}. The run goes on without it", flush=True)
                continue
            end = entry.get("lacks_from", math.inf) - 1
            if tracker.rewinds:
                # A run that starts over rewinds to before its first metrics, at step 0.
                end = min(end, done if done else -1)
            held = {metric: int(min(step, end)) for metric, step in reached.items()}
            senders.append(Sender(name, tracker, held if run.identity is not None else {}))
        used = {sender.name for sender in senders}
        for name, entry in known.items():
            if name not in used:
                entry["lacks_from"] = min(done + 1, entry.get("lacks_from", math.inf))
        return Trackers(folder, senders, known, done, kept)


class Trackers:
    """Passes a run's metrics to its trackers. A tracker never stops the run.

    Args:
      folder: the run's folder.
      senders: the senders of the trackers in use.
      known: the contents of `trackers.json`.
      done: the step after which the run resumes.
      rows: the lines of `metrics.jsonl` up to that step.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        senders: list[Sender],
        known: dict[str, dict[str, Any]],
        done: int,
        rows: Sequence[Mapping[str, Any]] = (),
    ):
        self._folder, self._senders = folder, senders
        self._samples = Tail(folder / SAMPLES, done)
        self._histograms = Tail(folder / HISTOGRAMS, done)
        begun: dict[str, dict[str, Any]] = {s.name: {"identity": s.identity} for s in senders}
        self._known = known | begun
        if self._known:
            self._write_identities()
        for row in rows:
            self._scalars(row["step"], row)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a step's numbers, and its histograms and samples from the run's folder."""
        if not self._senders:
            return
        self._scalars(step, metrics)
        for row in self._histograms.until(step):
            for name, bins in row.items():
                if name != "step":
                    self._histogram(row["step"], name, bins["edges"], bins["counts"])
        by_step: dict[int, list[dict[str, Any]]] = {}
        for row in self._samples.until(step):
            by_step.setdefault(row["step"], []).append(sample_of(row))
        for number, rows in by_step.items():
            for sender in self._senders:
                sender.samples(number, rows)
        self._drop_failed()

    def write_evaluation(
        self, step: int, metrics: Mapping[str, float], details: Mapping[str, Any] | None
    ) -> None:
        """Sends held-out numbers, and the histograms of `evaluation.json`."""
        self._scalars(step, metrics)
        bins = (details or {}).get("histogram")
        if bins is not None:
            for name, counts in bins["counts"].items():
                self._histogram(step, f"eval/scores/{name}", bins["edges"], counts)
        self._drop_failed()

    def close(self, *, failed: bool = False) -> None:
        """Waits for unsent data, with a time limit, and ends the trackers' runs."""
        senders, self._senders = self._senders, []
        for sender in senders:
            sender.close(failed=failed)
        self._report(senders)

    def _scalars(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = {name: float(value) for name, value in metrics.items() if name != "step"}
        for sender in self._senders:
            sender.scalars(step, values)

    def _histogram(self, step: int, name: str, edges: list[float], counts: list[float]) -> None:
        for sender in self._senders:
            sender.histogram(step, name, edges, counts)

    def _drop_failed(self) -> None:
        failed = [sender for sender in self._senders if sender.failure is not None]
        if failed:
            self._senders = [sender for sender in self._senders if sender.failure is None]
            self._report(failed)
            for sender in failed:
                sender.close(failed=True, patience=0)

    def _report(self, senders: Sequence[Sender]) -> None:
        """Prints the failure, and records the step from which the tracker lacks numbers."""
        for sender in senders:
            if sender.failure is not None:
                step, cause = sender.failure
                print(
                    f"run.trackers: {sender.name} failed at step {step} ({cause}). The run goes on "
                    f"without it; {METRICS} has all numbers, and a resume sends it what it lacks",
                    flush=True,
                )
                self._known[sender.name]["lacks_from"] = step
        if any(sender.failure is not None for sender in senders):
            self._write_identities()

    def _write_identities(self) -> None:
        replace_text(self._folder / IDENTITIES, json.dumps(self._known, indent=1) + "\n")


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The undamaged lines of `metrics.jsonl`, if there is one."""
    if not path.exists():
        return []
    # Split only at "\n", as `JsonlWriter` does.
    rows = map(parse_row, path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


def _read_identities(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """The record of an earlier start; {} without a valid file."""
    if not path.exists():
        return {}
    try:
        known = read_json_file(path)
        return {str(k): dict(v) for k, v in known.items() if isinstance(v["identity"], str)}
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        print(f"{path}: cannot be read; the trackers begin new runs", flush=True)
        return {}


def sample_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """An answer's data for trackers: its texts, and sums over its tokens."""
    sums = {name: round(sum(row[name]), 6) for name in ("kl", "rewards") if name in row}
    return {name: row[name] for name in _SAMPLE if name in row} | sums
