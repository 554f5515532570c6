"""A run's progress: batches taken, updates done, the epoch, and the learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxalign.data import count_samples
from jaxalign.run.tasks.task import Task
from jaxalign.types import TrainState


class CountedBatches(Iterator[Any]):
    """An iterator that counts batches.

    Args:
      batches: the run's batches.
      taken: the number taken by earlier starts.

    Attributes:
      taken: batches returned so far.
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
        """Samples returned on this host since the last call."""
        samples, self._samples = self._samples, 0
        return samples


class Progress:
    """A run's position in its data and schedules.

    Args:
      config: the run's config.
      task: the run's task.
      state: the initial state, from which updates are counted.
      taken: the number of batches taken by earlier starts.

    Attributes:
      batches: the iterator to take batches from.
    """

    def __init__(self, config: Any, task: Task, state: TrainState, taken: int):
        self.batches = CountedBatches(task.batches, taken)
        self._per_epoch = task.batches.per_epoch
        # The last batch may be short where the data ends, so it counts as a fraction.
        ends = None if config.run.epochs is not None else config.data.epochs
        self._last_epoch = math.inf if ends is None else float(ends)
        self._epoch = self._before = self._epoch_of(taken)
        self._rates = task.learning_rates
        self._updates = int(jax.device_get(state.step))

    def after_updates(self, count: int) -> dict[str, float]:
        """Counts a step with a number of updates.

        Returns:
          The learning rate of its last update, and the passes over the data if their size is known.
        """
        self._updates += count
        self._before, self._epoch = self._epoch, self._epoch_of(self.batches.taken)
        metrics = {
            name: float(rates[min(self._updates, len(rates)) - 1])
            for name, rates in self._rates.items()
        }
        return metrics if self._epoch is None else metrics | {"epoch": self._epoch}

    def falls_due(self, every: int | str, done: int) -> bool:
        """Whether an event is due after step `done`: every given number of steps, or each epoch."""
        if isinstance(every, int):
            return bool(every) and done % every == 0
        if self._epoch is None or self._before is None:
            return False
        return math.floor(self._epoch) > math.floor(self._before)

    def _epoch_of(self, taken: int) -> float | None:
        if self._per_epoch is None:
            return None
        # Rounded, so that 3 batches of ⅓ pass each make one pass.
        return min(round(taken / self._per_epoch, 9), self._last_epoch)
