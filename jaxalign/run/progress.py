"""How far a run is: batches taken, updates done, the epoch, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxalign.data import count_samples
from jaxalign.run.tasks.task import Task
from jaxalign.types import TrainState


class CountedBatches(Iterator[Any]):
    """An iterator of batches that counts what it gives out.

    Args:
      batches: of the run.
      taken: how many earlier starts took.

    Attributes:
      taken: batches given out so far.
    """

    def __init__(self, batches: Iterable[Any], taken: int):
        self._batches = iter(batches)
        self._samples = 0
        self.taken = taken

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.taken += 1
        self._samples += count_samples(batch)
        return batch

    def pop_samples(self) -> int:
        """Samples given out on this host since the last call."""
        samples, self._samples = self._samples, 0
        return samples


class Progress:
    """Where a run is in its data and in its schedules.

    Args:
      config: of the run.
      task: of the run.
      state: at the start, from which updates are counted.
      taken: batches that earlier starts took.

    Attributes:
      batches: the iterator to take batches from.
    """

    def __init__(self, config: Any, task: Task, state: TrainState, taken: int):
        self.batches = CountedBatches(task.batches, taken)
        self._per_epoch = task.batches.per_epoch
        # The last batch may be short where the data ends, and so be less than a whole one.
        ends = None if config.run.epochs is not None else config.data.epochs
        self._last_epoch = math.inf if ends is None else float(ends)
        self._epoch = self._before = self._epoch_of(taken)
        self._rates = task.learning_rates
        self._updates = int(jax.device_get(state.step))

    def after_updates(self, count: int) -> dict[str, float]:
        """Counts a step of so many updates.

        Returns:
          The rate of its last update, and the passes over the data, where their size is known.
        """
        self._updates += count
        self._before, self._epoch = self._epoch, self._epoch_of(self.batches.taken)
        metrics = {
            name: float(rates[min(self._updates, len(rates)) - 1])
            for name, rates in self._rates.items()
        }
        return metrics if self._epoch is None else metrics | {"epoch": self._epoch}

    def falls_due(self, every: int | str, done: int) -> bool:
        """Whether something is due after step `done`: every so many steps, or each epoch."""
        if isinstance(every, int):
            return bool(every) and done % every == 0
        if self._epoch is None or self._before is None:
            return False
        return math.floor(self._epoch) > math.floor(self._before)

    def _epoch_of(self, taken: int) -> float | None:
        if self._per_epoch is None:
            return None
        # Rounded, so that 3 batches of ⅓ of a pass each are one.
        return min(round(taken / self._per_epoch, 9), self._last_epoch)
