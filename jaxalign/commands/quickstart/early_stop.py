"""PPO's end: at a KL, or once the held-out judge says that answers have got worse.

Every iteration samples answers of the policy as it stands. Their KL and the judge's mean score are
therefore known for free, one iteration late. A run whose answers get worse ends with its best
policy. One that goes too far from its start is taken part of the way back:

    W ← W₀ + √(aim / KL) · (W − W₀),

since the KL grows as the square of the way that the weights have gone (interpolation towards the
initialization: Ramé et al. 2024, https://arxiv.org/abs/2406.16768, section 3.3).
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
      most_kl: nats an answer, beyond which the run ends.
      aim_kl: nats an answer that a policy which went too far is taken back to.
      patience: iterations clearly below the best score before the run ends.
      iterations: of the run. The last policy is not sampled from; its KL is estimated.

    Attributes:
      reason: why the run did not end with its last policy, as a clause; "" if it did.
      judged: the judge's mean score in each iteration.
    """

    def __init__(self, judge: Judge, most_kl: float, aim_kl: float, patience: int, iterations: int):
        self._judge, self._most_kl, self._aim_kl = judge, most_kl, aim_kl
        self._patience, self._iterations = patience, iterations
        self._first: Params | None = None
        self._kls: list[float] = []
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
        self._kls.append(kl)
        if self._first is None:
            self._first = jax.tree.map(jnp.copy, params)
        if kl > self._most_kl:
            self.reason = f"its KL came to {kl:.1f} nats, above {self._most_kl:g}"
            if self._best is None or score >= self._best[0] - error:
                self._best = (score, kl, self._taken_back(params, kl))
                self.reason += f", and it was taken back to about {self._aim_kl:g}"
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
        if self.reason and self._best is not None:
            return state._replace(params=self._best[2])
        kl = self._next_kl()
        if done < self._iterations or kl <= self._most_kl:
            return None
        self.reason = (
            f"its last policy's KL was about {kl:.1f} nats, above {self._most_kl:g}, and it was "
            f"taken back to about {self._aim_kl:g}"
        )
        return state._replace(params=self._taken_back(state.params, kl))

    def _taken_back(self, params: Params, kl: float) -> Params:
        part = math.sqrt(self._aim_kl / kl)
        return jax.tree.map(lambda start, now: start + part * (now - start), self._first, params)

    def _next_kl(self) -> float:
        """An estimate of the KL after the last updates; their steps are a little smaller each."""
        if len(self._kls) < 2:
            return 0.0
        before, now = (math.sqrt(max(kl, 0.0)) for kl in self._kls[-2:])
        return (now + _NEXT_STEP * max(now - before, 0.0)) ** 2


_NEXT_STEP = 0.75
"""The way that an iteration goes over that of the one before, as seen in runs of several seeds."""
