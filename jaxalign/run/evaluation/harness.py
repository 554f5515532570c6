"""Tasks of lm-eval (EleutherAI's evaluation harness), run on the model in this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from jaxalign.rewards.evaluation import Z95
from jaxalign.run.evaluation.figures import Figure, Measured
from jaxalign.run.evaluation.language_model import EvaluatedModel


def check_harness(option: str = "--tasks") -> None:
    """Raises ValueError if lm-eval is not installed; the message names the extra."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            f'{option} needs lm-eval, which is not installed; pip install "jaxalign[eval]", or '
            "measure files with choice, gsm8k and others"
        )


def measure_tasks(
    model: EvaluatedModel,
    tasks: Sequence[str],
    include_path: str | None = None,
    num_fewshot: int | None = None,
    *,
    apply_chat_template: bool = False,
    option: str = "--tasks",
) -> dict[str, Measured]:
    """Runs tasks by name.

    Args:
      model: the model to evaluate.
      tasks: names such as "hellaswag", of lm-eval or of YAML files in `include_path`.
      include_path: folder with more tasks; tasks on local files need no network.
      num_fewshot: examples before each question; None: the task's own.
      apply_chat_template: whether prompts are written under the tokenizer's chat template.
      option: the option that names the tasks, for messages.

    Returns:
      The figures of each task, with 95 % intervals from lm-eval's standard errors.

    Raises:
      ValueError: lm-eval is not installed, or has no such task.
    """
    check_harness(option)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from jaxalign.run.evaluation.lm_eval_model import JaxLM

    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"{option}: lm-eval has no {', '.join(unknown)}; `lm_eval ls tasks` lists what it has, "
            "and an include path names a folder of further ones"
        )
    seed = model.options.seed
    output: Any = simple_evaluate(
        model=JaxLM(model),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=model.options.limit,
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )
    return {
        name: Measured(_figures(values, output["n-samples"].get(name, {}).get("effective", 0)))
        for name, values in output["results"].items()
    }


def _figures(values: dict[str, Any], count: int) -> dict[str, Figure]:
    """lm-eval's `{"acc,none": 0.5, "acc_stderr,none": 0.1, …}`."""
    figures = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        known = isinstance(error, int | float)
        low, high = (value - Z95 * error, value + Z95 * error) if known else (None, None)
        name = metric if kind == "none" else f"{metric}/{kind}"
        figures[name] = Figure(float(value), low, high, count, "rows")
    return figures
