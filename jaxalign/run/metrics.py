"""Writes metrics: `metrics.jsonl` in the run folder, one JSON object per step."""

from __future__ import annotations

import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.data.bounds import parse_json
from jaxalign.run.storage import LineFile, what_is_safe
from jaxalign.types import Weighted


def to_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Device scalars → Python floats, in one transfer."""
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def check_finite(metrics: Mapping[str, float], step: int) -> None:
    """Stops a run whose loss or gradient is not finite.

    Raises:
      FloatingPointError: the message names the step and the metrics.
    """
    bad = [k for k in ("loss", "grad_norm") if not math.isfinite(metrics.get(k, 0.0))]
    if bad:
        values = ", ".join(f"{k}={metrics[k]}" for k in bad)
        raise FloatingPointError(
            f"step {step}: {values}; the weights are unusable from here on. Resume from the last "
            "checkpoint with a lower learning rate, or look at the batch of this step"
        )


def add_up(parts: Sequence[Mapping[str, Weighted]]) -> dict[str, float]:
    """Exact means over several batches: adds totals and weights, then divides once."""
    names = parts[0].keys() if parts else ()
    fetched = jax.device_get(parts)
    sums = {
        n: [np.sum([p[n].total for p in fetched]), np.sum([p[n].weight for p in fetched])]
        for n in names
    }
    return {n: float(total / weight) if weight > 0 else 0.0 for n, (total, weight) in sums.items()}


_EVAL = "eval/"
METRICS = "metrics.jsonl"
"""Name of the file in a run's folder."""

TOKENS, FLOPS = "time/tokens", "time/flops"
"""The names under which a task reports the real tokens and model FLOPs of a batch."""


def rates(tokens: float, flops: float, seconds: float, peak: float | None) -> dict[str, float]:
    """Speed of a step.

    Args:
      tokens: real tokens of the step, on all devices.
      flops: its model FLOPs (`jaxalign.models.flops`), on all devices.
      seconds: its duration.
      peak: total peak FLOP/s of all devices; None if unknown.
    """
    found = {
        "time/tokens_per_second": tokens / seconds,
        "time/model_flops_per_second": flops / seconds,
    }
    return found if peak is None else found | {"time/mfu": flops / seconds / peak}


class Stopwatch:
    """Measures the seconds of consecutive parts, `time/<part>`; waits for the end of each."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begins anew."""
        self._parts, self._last = {}, time.perf_counter()

    def lap(self, part: str, done: Any = None) -> None:
        """Ends a part once the arrays `done` are computed."""
        jax.block_until_ready(done)
        now = time.perf_counter()
        self._parts[f"time/{part}"], self._last = now - self._last, now

    def stop(self, part: str, done: Any = None) -> dict[str, float]:
        """Ends the last part; returns the seconds of all parts."""
        self.lap(part, done)
        return self._parts

    def around(self, run: Callable[..., Any], before: str, within: str) -> Callable[..., Any]:
        """Wraps `run`: ends the part `before` once its inputs are ready, then `within`."""

        def timed(*arguments: Any) -> Any:
            self.lap(before, arguments)
            result = run(*arguments)
            self.lap(within, result)
            return result

        # A reward that scores answers while they are being written, see `ppo.score_early`.
        timed.early_watch = getattr(run, "early_watch", None)  # pyrefly: ignore[missing-attribute]
        return timed


class JsonlWriter:
    """Appends metrics to a file, one JSON object per line, flushed at once.

    Args:
      path: the file; its folder must exist.
      resume_at: keep the lines up to this step and drop the rest, so that a resumed run's file
        looks like an uninterrupted one. None starts a new file. Damaged lines are dropped, counted
        and printed; a truncated last line is simply dropped.
      silent: write nothing, because another process does.

    Attributes:
      evaluations: step → its held-out metrics, without their `eval/`.

    Raises:
      StorageError: storage fails for longer than retries take.
    """

    def __init__(
        self, path: str | pathlib.Path, resume_at: int | None = None, *, silent: bool = False
    ):
        self._file: LineFile | None = None
        self.evaluations: dict[int, dict[str, float]] = {}
        path = pathlib.Path(path)
        kept: list[bytes] = []
        damaged: list[int] = []
        if resume_at is not None and path.exists():
            # Split only at "\n": a text may contain other line separators, such as U+2028.
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, start=1):
                row = parse_row(line)
                if row is None:
                    damaged += [number] if line and number < len(lines) else []
                elif row["step"] <= resume_at:
                    kept.append(line)
                    self._note(row["step"], row)
        if silent:
            return
        if damaged:
            places = ", ".join(map(str, damaged[:8])) + (" …" if len(damaged) > 8 else "")
            print(f"{path}: dropped {len(damaged)} damaged lines ({places})")
        # Replaced atomically: a run killed here keeps the old file.
        fresh = path.with_name(f".{path.name}.tmp")
        fresh.write_bytes(b"".join(line + b"\n" for line in kept))
        fresh.replace(path)
        self._file = LineFile(path, lambda: what_is_safe(path.parent / "checkpoints"))

    @property
    def evaluated(self) -> int | None:
        """The last step with held-out metrics in the file, or None."""
        return next(reversed(self.evaluations), None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line; a value that is not finite is written as a string, to stay JSON."""
        self._note(step, metrics)
        if self._file is None:
            return
        row = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        self._file.write(json.dumps({"step": step} | row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()

    def _note(self, step: int, row: Mapping[str, Any]) -> None:
        figures = {
            name.removeprefix(_EVAL): _number(value)
            for name, value in row.items()
            if name.startswith(_EVAL)
        }
        if figures:
            self.evaluations[step] = figures


def read_evaluations(path: pathlib.Path) -> dict[int, dict[str, float]]:
    """Step → held-out metrics, without their `eval/`; damaged lines are skipped."""
    return JsonlWriter(path, resume_at=sys.maxsize, silent=True).evaluations


def _number(value: Any) -> float:
    """A metric as it was written; NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line with a `step`, as in `metrics.jsonl`; None if it is damaged."""
    try:
        row = parse_json(line)
        return row if type(row["step"]) is int else None
    except (ValueError, KeyError, TypeError):
        return None
