"""The best checkpoint by a held-out metric: which direction is better, and its step."""

from __future__ import annotations

import math
import pathlib
import re
from collections.abc import Iterable, Mapping

from jaxalign.run.metrics import read_evaluations

_LOWER = frozenset({"loss", "nll", "kl", "perplexity", "ppl", "entropy", "error", "mse", "brier"})
"""Words in a metric's name that mean lower is better; otherwise higher is better."""

_PREFIX = "eval/"


def parse_metric(text: str) -> tuple[str, bool]:
    """Reads `run.keep_best`.

    Args:
      text: a held-out metric, with or without its `eval/`. Lower is better if "loss", "nll", "kl",
        "perplexity", "ppl", "entropy", "error", "mse" or "brier" is a word of its name; otherwise
        higher is better. `:min` or `:max` after the name overrides this.

    Returns:
      (its name without `eval/`, whether lower is better).

    Raises:
      ValueError: no name, or something else after the colon.
    """
    name, colon, way = text.removeprefix(_PREFIX).partition(":")
    if not name or (colon and way not in ("min", "max")):
        raise ValueError(
            f"run.keep_best={text!r}: wanted the name of a held-out figure, such as "
            "eval/loss/nll, with :min or :max behind it where the name does not say what is better"
        )
    if colon:
        return name, way == "min"
    return name, not _LOWER.isdisjoint(re.split(r"[^a-z]+", name.lower()))


class BestStep:
    """Tracks the best checkpoint over evaluations.

    Args:
      option: `run.keep_best`; None: nothing is tracked.

    Attributes:
      step: the best checkpoint's step; None while there is none.
      value: its metric.
    """

    def __init__(self, option: str | None):
        self.step: int | None = None
        self.value = math.nan
        self._name, self._lower = ("", False) if option is None else parse_metric(option)
        self._follows = option is not None

    def is_better(self, figures: Mapping[str, float]) -> bool:
        """Whether metrics beat the best checkpoint's; NaN and a tie never do.

        Raises:
          ValueError: the figure is not among them.
        """
        if not self._follows or not figures:
            return False
        if self._name not in figures:
            raise ValueError(
                f"run.keep_best={_PREFIX}{self._name}: wanted one of the held-out figures "
                f"{', '.join(_PREFIX + name for name in sorted(figures))}"
            )
        value = float(figures[self._name])
        if self.step is None or math.isnan(value):
            return not math.isnan(value)
        return value < self.value if self._lower else value > self.value

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Records a checkpoint as the best if it is."""
        if self.is_better(figures):
            self.step, self.value = step, float(figures[self._name])

    def resume(self, evaluations: Mapping[int, Mapping[str, float]], steps: Iterable[int]) -> None:
        """Finds the best checkpoint of an earlier start.

        Args:
          evaluations: step → its held-out figures, as `metrics.jsonl` has them.
          steps: the steps that have checkpoints.
        """
        for step in sorted(set(steps) & evaluations.keys()):
            if self._name in evaluations[step]:
                self.add(step, evaluations[step])

    def message(self, folder: object) -> str | None:
        """One line for the end of a run; None if nothing is tracked."""
        if not self._follows:
            return None
        if self.step is None:
            return f"best by {_PREFIX}{self._name}: no checkpoint has a value of it"
        way = "lower" if self._lower else "higher"
        return (
            f"best by {_PREFIX}{self._name} ({way} is better): {self.value:.6g} at step "
            f"{self.step}; jaxalign export {folder} --best --out DIR writes it"
        )


def best_of_run(folder: pathlib.Path, option: str | None, steps: Iterable[int]) -> int:
    """The step of a run's best checkpoint, according to its `metrics.jsonl`.

    Args:
      folder: the run's folder.
      option: its `run.keep_best`.
      steps: of its checkpoints.

    Raises:
      ValueError: the run keeps none, or no checkpoint has a value.
    """
    steps = sorted(steps)
    there = ", ".join(map(str, steps)) or "none"
    if option is None:
        raise ValueError(
            f"{folder}: a best checkpoint is kept by runs with run.keep_best, which this one has "
            f"not; name a step (there are: {there})"
        )
    best = BestStep(option)
    best.resume(read_evaluations(folder / "metrics.jsonl"), steps)
    if best.step is None:
        raise ValueError(
            f"{folder}: none of its checkpoints (there are: {there}) has a value of {option} in "
            "metrics.jsonl; name a step"
        )
    return best.step
