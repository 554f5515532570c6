"""Early stopping of PPO: at a KL limit, or when the held-out judge finds answers getting worse.

Every iteration samples answers from the current policy. Their KL and the judge's mean score are
therefore free, but one iteration late. A run whose answers get worse ends with its best policy. A
policy that moves too far from its start is moved part of the way back:

    W ← W₀ + √(aim / KL) · (W − W₀),

since the KL grows as the square of the weights' distance from the start (interpolation towards the
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
      judge: scores answers; its training data is unseen by the reward model.
      most_kl: the KL, in nats per answer, above which the run ends.
      aim_kl: the KL, in nats per answer, to which a policy beyond `most_kl` is moved back.
      patience: iterations clearly below the best score before the run ends.
      iterations: the run's iterations. The last policy is not sampled from; its KL is estimated.

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
            # Every answer is in one update per epoch, so this is the mean over all answers.
            scores = self._judge.scores([d for part in updates for d in documents_of(part)])
            error = float(scores.std()) / math.sqrt(len(scores))
            self.look(state.params, float(scores.mean()), metrics["objective/kl"], error)
            return updates, metrics | {"judge/score": float(scores.mean())}

        return task._replace(prepare_updates=prepare_updates, end_with=self.end_with)

    def look(self, params: Params, score: float, kl: float, error: float = 0.0) -> None:
        """Records what an iteration's answers show about the policy that sampled them.

        Args:
          params: that policy's parameters, before the iteration's updates; copied if kept.
          score: the judge's mean.
          kl: KL from the reference, nats per answer.
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
        """The final state, to end now, or None to continue."""
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
        """An estimate of the KL after the last updates, whose steps get slightly smaller."""
        if len(self._kls) < 2:
            return 0.0
        before, now = (math.sqrt(max(kl, 0.0)) for kl in self._kls[-2:])
        return (now + _NEXT_STEP * max(now - before, 0.0)) ** 2


_NEXT_STEP = 0.75
"""The way that an iteration goes over that of the one before, as seen in runs of several seeds."""
