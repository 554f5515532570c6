"""Reports step metrics: from the devices to `metrics.jsonl`, the history and the progress bar."""

from __future__ import annotations

import collections
import contextlib
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxalign.data.paths import replace_text
from jaxalign.parallel import distributed
from jaxalign.parallel.chips import peak_flops
from jaxalign.run.bad_steps import BadSteps, combine_updates
from jaxalign.run.bar import default_bar
from jaxalign.run.metrics import (
    FLOPS,
    METRICS,
    TOKENS,
    JsonlWriter,
    check_finite,
    rates,
    to_floats,
)
from jaxalign.run.stopping import Wishes
from jaxalign.run.storage import retry
from jaxalign.run.trackers.hub import Trackers
from jaxalign.run.usage import write_usage

SHOWN = (
    "loss",
    "accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "objective/scores",
    "objective/kl",
    "response/length",
)
"""The most important metrics, in order, for the progress bar and the top of a report."""


class StepRecord(NamedTuple):
    """A step that may still be running; its device metrics can be read once it is done.

    Attributes:
      step: the number of batches done, including this one.
      updates: metrics of each update on the devices (one; several in PPO).
      metrics: metrics known before the update.
      timing: seconds of its parts, `time/…`.
      counts: waits for and returns all hosts' (real tokens, token slots, samples, requests to save,
        requests to stop, tokens, 10⁹ FLOPs, FLOPs).
      compiles: how many times the step has been compiled.
      origins: returns `file:line` of the batch's rows.
    """

    step: int
    updates: list[dict[str, Any]]
    metrics: dict[str, float]
    timing: dict[str, float]
    counts: Callable[[], list[int]]
    compiles: int
    origins: Callable[[], list[str]] = list


class Seen(NamedTuple):
    """The amount of data a run has trained on so far, over all hosts and starts.

    Attributes:
      tokens: real tokens; in PPO the tokens of prompts and answers.
      samples: documents, pairs or prompts.
    """

    tokens: int = 0
    samples: int = 0


class Reporter:
    """Records one step after the other.

    Args:
      folder: the run's folder, which holds `metrics.jsonl`.
      title: shown beside the progress bar.
      total: steps of the run.
      done: steps done by earlier starts.
      log_every: steps between printed lines.
      seen: the data seen by earlier starts; None: no earlier start.
      bad_steps: counts skipped updates; None: the first one ends the run.
      make_bar: (title, total, done) → the caller's progress bar; None: `default_bar`.
      trackers: they get the same metrics as `metrics.jsonl`; None: no trackers.

    Attributes:
      history: the metrics of all steps reported here.
      seen: the data seen in all reported steps.
      wishes: any host's requests, as of the last reported step.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        title: str,
        total: int,
        done: int,
        log_every: int,
        seen: Seen | None = None,
        *,
        bad_steps: BadSteps | None = None,
        make_bar: Callable[[str, int, int], Any] | None = None,
        trackers: Trackers | None = None,
    ):
        self._trackers = Trackers(folder, [], {}, done) if trackers is None else trackers
        self._bad_steps = BadSteps(1, {}) if bad_steps is None else bad_steps
        silent = not distributed.is_main()
        self.history: list[dict[str, float]] = []
        self.seen, self.wishes = seen or Seen(), Wishes(False, False)
        self._folder, self._total, self._log_every = folder, total, log_every
        self._writer = JsonlWriter(folder / METRICS, done or None, silent=silent)
        self._bar = (
            default_bar(title, total, done, silent=silent)
            if make_bar is None
            else make_bar(title, total, done)
        )
        self._pending: collections.deque[StepRecord] = collections.deque()
        self._peak = peak_flops()
        self._reported_at = time.perf_counter()

    def start_clock(self) -> None:
        """Starts timing the next step now, so that evaluation and saving are not part of it."""
        self._reported_at = time.perf_counter()

    def add(self, record: StepRecord, *, keep: int) -> None:
        """Adds a step, and reports the oldest steps until only `keep` are unread."""
        self._pending.append(record)
        while len(self._pending) > keep:
            self._report(self._pending.popleft())

    def settle(self) -> None:
        """Reports all remaining steps."""
        while self._pending:
            self._report(self._pending.popleft())

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Step → held-out metrics, including those of earlier starts."""
        return self._writer.evaluations

    def has_evaluation(self, step: int) -> bool:
        """Whether held-out metrics of this step are already recorded."""
        return self._writer.evaluated == step

    def evaluation(
        self, step: int, figures: dict[str, float], details: dict[str, Any] | None
    ) -> None:
        """Writes held-out figures, and their curves and tables to `evaluation.json`."""
        named = {f"eval/{name}": value for name, value in figures.items()}
        self._writer.write(step, named)
        self._trackers.write_evaluation(step, named, details)
        write_usage(self._folder)
        if details is not None and distributed.is_main():
            text = json.dumps({"step": step} | details, indent=1)
            path = self._folder / "evaluation.json"
            retry(lambda: replace_text(path, text + "\n"), str(path), self._folder)

    def close(self) -> None:
        """Ends the progress bar, closes the file and records the run's memory usage."""
        self._bar.close()
        self._writer.close()
        write_usage(self._folder)

    def close_bar(self) -> None:
        """Ends the progress bar."""
        self._bar.close()

    def _report(self, record: StepRecord) -> None:
        real_tokens, slots, samples, saves, stops, tokens, giga_flops, flops = record.counts()
        self.wishes = Wishes(bool(saves), bool(stops))
        updates = [to_floats(logged) for logged in record.updates]
        metrics = record.metrics | combine_updates(updates)
        # A step without the guard has no such metric, and its weights would be non-finite.
        guarded = "bad_steps" in metrics
        check_finite({} if guarded else metrics, record.step)
        metrics["compiles"] = record.compiles
        metrics["data/fill"] = real_tokens / slots
        self.seen = Seen(self.seen.tokens + tokens, self.seen.samples + samples)
        metrics |= {"tokens_seen": self.seen.tokens, "samples_seen": self.seen.samples}
        now = time.perf_counter()
        seconds, self._reported_at = now - self._reported_at, now
        speed = rates(tokens, giga_flops * _GIGA + flops, seconds, self._peak)
        row = metrics | record.timing | {"time/step": seconds} | speed
        self._writer.write(record.step, row)
        self._trackers.write(record.step, row)
        self.history.append(metrics)
        self._bad_steps.add(record.step, updates, record.origins)
        rate = f", {speed['time/tokens_per_second']:.3g} tokens/s"
        with contextlib.suppress(OSError):  # the terminal's output may go to a full disk
            self._show(record.step, _short(metrics), rate)

    def _show(self, step: int, text: str, rate: str) -> None:
        """Moves the progress bar; prints a line every `log_every` steps."""
        self._bar.set_postfix_str(text + rate, refresh=False)
        self._bar.update()
        if step % self._log_every == 0 and not self._bar.disable:
            self._bar.write(f"{self._bar.desc} {step}/{self._total}: {text}")


_GIGA = 10**9


def pop_work(timing: dict[str, float]) -> list[int]:
    """Removes tokens and FLOPs from the timings: integers below 2³¹, to be summed over hosts."""
    return [int(timing.pop(TOKENS)), *divmod(int(timing.pop(FLOPS)), _GIGA)]


def _short(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {metrics[k]:.3g}" for k in SHOWN if k in metrics)
