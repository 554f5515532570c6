"""A run between its set-up and its end: what it evaluates, reports and saves with."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from jaxalign.parallel import distributed
from jaxalign.run.bad_steps import BadSteps, check_weights
from jaxalign.run.best import BestStep
from jaxalign.run.checkpoint import Checkpoints
from jaxalign.run.early_stopping import EarlyStopper
from jaxalign.run.progress import Progress
from jaxalign.run.record import write_data_report
from jaxalign.run.reporter import Reporter
from jaxalign.run.tasks import Task
from jaxalign.run.tasks.task import Loop
from jaxalign.types import TrainState


@dataclasses.dataclass
class Running:
    """The parts of a run that the loop works with; its train state is passed from step to step.

    Attributes:
      task: the algorithm with its models and data.
      loop: the algorithm's own values between steps, such as β of PPO.
      folder: the run's folder.
      store: its checkpoints; None: none are kept.
      reporter: writes metrics.
      best: the best checkpoint so far.
      bad_steps: counts steps that were skipped.
      early: says when to end early.
      progress: where the run is in its data.
      figures: the newest held-out metrics; {}: none yet.
      saved_at: the step of the newest checkpoint.
    """

    task: Task
    loop: Loop
    folder: pathlib.Path
    store: Checkpoints | None
    reporter: Reporter
    best: BestStep
    bad_steps: BadSteps
    early: EarlyStopper
    progress: Progress
    figures: dict[str, float]
    saved_at: int

    def evaluate(self, state: TrainState, done: int, *, may_end: bool = True) -> None:
        """Computes and records held-out metrics, if there are held-out data.

        Args:
          state: after `done` steps.
          done: steps done.
          may_end: whether they may end the run early.
        """
        self.figures = {}
        if self.task.evaluate is None:
            return
        self.figures = self.task.evaluate(state, self.loop)
        details = None if self.task.details is None else self.task.details()
        self.reporter.evaluation(done, self.figures, details)
        if may_end:
            self.early.add(done, self.figures)

    def save(self, state: TrainState, done: int, *, evaluated: bool) -> bool:
        """Saves a checkpoint unless it would hold nothing new; returns whether it did.

        Args:
          state: after `done` steps.
          done: steps done.
          evaluated: whether `figures` are of this step.
        """
        if not self.bad_steps.holds_news(done, self.saved_at):
            return False
        if evaluated:
            self._mark_best(done)
        if self.store is not None:
            check_weights(state.params, f"step {done}")
            self.store.save(done, state, self.position(done))
        self.saved_at = done
        return True

    def finish(self, state: TrainState, done: int) -> None:
        """Waits until the last checkpoint is on disk."""
        if self.store is not None:
            self.store.finish(done, state, self.position(done))

    def end(self, state: TrainState, done: int) -> None:
        """The last evaluation, checks and checkpoint.

        Raises:
          FloatingPointError: no update was ever made, or a held-out loss is not finite.
        """
        # All hosts agree on whether to evaluate.
        own = "" if self.reporter.has_evaluation(done) else "lacking"
        if distributed.all_gather_text("the last evaluation", own)[0] == "lacking":
            self.evaluate(state, done, may_end=False)
        write_data_report(self.folder, self.task.data_report())  # by now a stream has been read
        self.bad_steps.check_end(state, self.figures)
        if self.saved_at == done:
            self._mark_best(done)
        self.save(state, done, evaluated=True)
        self.finish(state, done)

    def position(self, done: int) -> dict[str, Any]:
        """The run's position, besides its train state, as JSON-able data."""
        return {
            "loop": self.loop,
            "done": done,
            "batches": self.task.batches.get_state(),
            "taken": self.progress.batches.taken,
            "seen": self.reporter.seen._asdict(),
            "early": self.early.state(),
        }

    def _mark_best(self, step: int) -> None:
        """Marks a step's checkpoint as the best if its metrics are; called before it is saved."""
        self.best.add(step, self.figures)
        if self.store is not None:
            self.store.best = self.best.step
