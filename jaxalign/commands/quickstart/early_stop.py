"""PPO's end: at a KL, or once the held-out judge says that answers have got worse.

Every iteration samples answers of the policy as it stands. Their KL and the judge's mean score are
therefore known for free, one update late. The best policy so far is kept, and a run that has gone
too far ends with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.commands.quickstart.judge import Judge, documents_of
from jaxalign.run.tasks.task import Floats, Loop, Task
from jaxalign.types import Params, TrainState


class EarlyStop:
    """Watches the rollouts of a run.

    Args:
      judge: scores answers; the reward model never saw what it learned from.
      most_kl: nats an answer; a policy beyond it is never kept.
      patience: iterations clearly below the best score before the run ends.

    Attributes:
      reason: why the run ended before its last iteration, as a clause; "" if it did not.
      judged: the judge's mean score in each iteration.
    """

    def __init__(self, judge: Judge, most_kl: float, patience: int):
        self._judge, self._most_kl, self._patience = judge, most_kl, patience
        self._best: tuple[float, float, Params] | None = None
        self._worse = 0
        self.reason = ""
        self.judged: list[float] = []

    def adapt(self, task: Task) -> Task:
        """The task with this end."""

        def prepare_updates(
            key: jax.Array, state: TrainState, batch: Any, loop: Loop, data: Iterator[Any]
        ) -> tuple[Iterable[Any], Floats]:
            updates, metrics = task.prepare_updates(key, state, batch, loop, data)
            updates = list(updates)
            # Every answer is in as many updates as there are epochs: the mean is that of all.
            scores = self._judge.scores([d for part in updates for d in documents_of(part)])
            error = float(scores.std()) / math.sqrt(len(scores))
            self.look(state.params, float(scores.mean()), metrics["objective/kl"], error)
            return updates, metrics | {"judge/score": float(scores.mean())}

        return task._replace(prepare_updates=prepare_updates, end_with=self.end_with)

    def look(self, params: Params, score: float, kl: float, error: float = 0.0) -> None:
        """Takes what an iteration's answers say of the policy that gave them.

        Args:
          params: of that policy, before the iteration's updates; copied if they are kept.
          score: the judge's mean.
          kl: from the reference, nats an answer.
          error: standard error of `score`: a mean within it of the best is as good.
        """
        self.judged.append(score)
        if kl > self._most_kl:
            self.reason = f"its KL came to {kl:.1f} nats, above {self._most_kl:g}"
        elif self._best is None or score > self._best[0]:
            self._best, self._worse = (score, kl, jax.tree.map(jnp.copy, params)), 0
        elif score < self._best[0] - error:
            self._worse += 1
            if self._worse >= self._patience:
                self.reason = (
                    f"the held-out judge's mean score fell from {self._best[0]:.2f} to {score:.2f}"
                )

    def end_with(self, state: TrainState, done: int) -> TrainState | None:
        """The state to end with now, or None to go on."""
        if not self.reason or self._best is None:
            return None
        return state._replace(params=self._best[2])
