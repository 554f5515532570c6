"""Skipped updates: counted and printed with their rows; too many in a row end the run.

The step itself leaves the state unchanged (`algorithms.guard`) and reports it in its metric
`bad_steps`. This file reads that metric. Non-finite weights are never saved or exported, and a run
without a finite result is an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxalign.algorithms.guard import all_finite
from jaxalign.parallel import distributed
from jaxalign.types import Params, PromptBatch, TrainState

METRIC = "bad_steps"
_SHOWN = 12
"""Rows named in a message."""


class BadSteps:
    """Counts how many updates in a row were skipped.

    Args:
      limit: `run.bad_steps`; this many in a row end the run.
      loop: the loop's state, which checkpoints save. It holds the count, so that a resumed run ends
        where an uninterrupted one would.
    """

    def __init__(self, limit: int, loop: dict[str, Any]):
        self._limit, self._loop = limit, loop
        self._steps_in_a_row = 0

    @property
    def in_a_row(self) -> int:
        """Updates skipped since the last good one."""
        return self._loop.get(METRIC, 0)

    def holds_news(self, done: int, saved_at: int) -> bool:
        """Whether a checkpoint now would hold anything new.

        It would not if every step since the last one was bad. Saving it would delete an older
        checkpoint from before the cause.
        """
        return done - self._steps_in_a_row > saved_at

    def add(
        self, step: int, updates: Sequence[Mapping[str, float]], origins: Callable[[], list[str]]
    ) -> None:
        """Counts the updates of a step, and prints the skipped ones with their rows.

        Raises:
          FloatingPointError: `limit` in a row.
        """
        bad = [update for update in updates if update.get(METRIC)]
        self._steps_in_a_row = self._steps_in_a_row + 1 if len(bad) == len(updates) else 0
        for update in updates:
            self._count(bool(update.get(METRIC)))
            if self.in_a_row >= self._limit:
                raise FloatingPointError(
                    f"step {step}: {_values(update)}; {self.in_a_row} updates in a row were left "
                    f"out (run.bad_steps={self._limit}){_rows(origins)}. The weights are those "
                    "from before. Resume from the last checkpoint with a lower learning rate, or "
                    "look at these rows"
                )
        if bad and distributed.is_main():
            tqdm.write(
                f"step {step}: {_values(bad[0])}; {len(bad)} of {len(updates)} updates left out, "
                f"{self.in_a_row} in a row (run.bad_steps={self._limit} ends the run)"
                f"{_rows(origins)}"
            )

    def _count(self, bad: bool) -> None:
        if bad:
            self._loop[METRIC] = self.in_a_row + 1
        else:
            self._loop.pop(METRIC, None)

    def check_end(self, state: TrainState, figures: Mapping[str, float]) -> None:
        """Checks a run at its end.

        Args:
          state: at the end.
          figures: held-out figures after the last step.

        Raises:
          FloatingPointError: no update was ever made, or a held-out loss is not finite.
        """
        if self.in_a_row and int(state.step) == 0:
            raise FloatingPointError(
                f"no update was made: loss, gradient or weights of all {self.in_a_row} were not "
                "finite; use a lower learning rate, or look at the data"
            )
        bad = [k for k, v in figures.items() if k.startswith("loss") and not math.isfinite(v)]
        if bad:
            raise FloatingPointError(
                f"after the last step {bad[0]}={figures[bad[0]]} on held-out data: the weights are "
                "unusable and are not exported; resume from an earlier checkpoint with a lower "
                "learning rate"
            )


def combine_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Combines the metrics of one batch's updates (several in PPO).

    They are means over the updates that were made, or over all if none was made; `bad_steps` counts
    those skipped.
    """
    good = [update for update in updates if not update.get(METRIC)] or updates
    metrics = {k: sum(u[k] for u in good) / len(good) for k in updates[0]}
    if METRIC in metrics:
        metrics[METRIC] = sum(update[METRIC] for update in updates)
    return metrics


def check_weights(params: Params, what: str) -> None:
    """Raises FloatingPointError for weights that are not finite.

    Args:
      params: on any number of devices.
      what: the start of the message, such as "step 7".
    """
    if not bool(_all_finite(params)):
        raise FloatingPointError(
            f"{what}: some weights are not finite; nothing was saved. Resume from the last "
            "checkpoint with a lower learning rate"
        )


_all_finite = jax.jit(all_finite)


def origins_of(task: Any, batch: Any, number: int) -> list[str]:
    """`file:line` of a batch's rows, if known.

    Args:
      task: the run's task.
      batch: the batch as it came from the data.
      number: the step's number, from 1.
    """
    examples = task.batches.examples
    if isinstance(batch, PromptBatch):
        index = np.asarray(batch.index)
        rows = index[index >= 0].tolist()
    else:
        rows = task.batches.rows_of(number - 1)
    found = [getattr(examples[row], "origin", None) for row in rows if row < len(examples)]
    return [origin for origin in found if origin]


def _values(update: Mapping[str, float]) -> str:
    return ", ".join(f"{k}={update[k]:.6g}" for k in ("loss", "grad_norm") if k in update)


def _rows(origins: Callable[[], list[str]]) -> str:
    rows = origins()
    if not rows:
        return ""
    more = len(rows) - _SHOWN
    return f"; rows: {', '.join(rows[:_SHOWN])}" + (f" and {more} more" if more > 0 else "")
