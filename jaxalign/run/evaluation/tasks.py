"""The tasks of `run.eval_tasks`, which evaluate the policy during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxalign.run.config.eval_tasks import LOCAL, EvalTask
from jaxalign.run.evaluation import measures
from jaxalign.run.evaluation.figures import Measured
from jaxalign.run.evaluation.harness import check_harness, measure_tasks
from jaxalign.run.evaluation.language_model import EvalOptions, EvaluatedModel
from jaxalign.types import Params

OPTION = "run.eval_tasks"

_MEASURES: Mapping[str, Callable[[EvaluatedModel, Sequence[str]], Measured]] = {
    "loss": measures.measure_loss,
    "choice": measures.measure_choice,
    "gsm8k": measures.measure_gsm8k,
    "ifeval": measures.measure_ifeval,
}


class TaskEvaluator:
    """Evaluates a policy on tasks, reusing the programs compiled the first time.

    Args:
      tasks: the tasks.
      tok: the policy's tokenizer.
      chat_template: the run's.
      thinking: the option of the run's data.

    Raises:
      ValueError: lm-eval is needed and not installed, or there are several processes.
    """

    def __init__(
        self, tasks: Sequence[EvalTask], tok: Any, chat_template: str | None, thinking: str
    ):
        if any(task.task not in LOCAL for task in tasks):
            check_harness(OPTION)
        if jax.process_count() > 1:
            raise ValueError(
                f"{OPTION}: wanted one process, got {jax.process_count()}; measure the exported "
                "checkpoints with `jaxalign eval`"
            )
        self._tasks, self._tok = tasks, tok
        self._template, self._thinking = chat_template, thinking
        self._models: dict[str, EvaluatedModel] = {}

    def __call__(self, model: Any, params: Params) -> dict[str, float]:
        """The figures of all tasks, named `<task>/<figure>`.

        Args:
          model: the policy without adapters, the same each time.
          params: its parameters.
        """
        found = {}
        for task in self._tasks:
            measured = self._measure(task, self._model_of(task, model, params))
            for name, figure in measured.figures.items():
                found[f"{task.title}/{name}"] = float(figure.value)
        return found

    def _model_of(self, task: EvalTask, model: Any, params: Params) -> EvaluatedModel:
        if task.title not in self._models:
            options = EvalOptions(
                batch=task.batch,
                length=task.length,
                max_new_tokens=task.max_new_tokens,
                limit=task.limit,
                chat_template=self._template,
                thinking=self._thinking,
            )
            self._models[task.title] = EvaluatedModel(model, params, self._tok, options)
        asked = self._models[task.title]
        asked.params = params
        return asked

    def _measure(self, task: EvalTask, model: EvaluatedModel) -> Measured:
        if task.task in _MEASURES:
            return _MEASURES[task.task](model, task.files)
        results = measure_tasks(
            model, [task.task], task.include_path, task.num_fewshot, option=OPTION
        )
        # A group of tasks has its own figures and those of each member.
        figures = {
            figure if name == task.task else f"{name}/{figure}": value
            for name, measured in results.items()
            for figure, value in measured.figures.items()
        }
        return Measured(figures)

    def forget(self) -> None:
        """Releases the parameters, which the next step may donate."""
        for asked in self._models.values():
            asked.params = {}
