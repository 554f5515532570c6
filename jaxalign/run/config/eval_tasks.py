"""The list `run.eval_tasks`."""

from __future__ import annotations

import dataclasses

from jaxalign.run.config.data import want

LOCAL = ("loss", "choice", "gsm8k", "ifeval")
"""Tasks on files of rows; any other name is a task of lm-eval."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A task to evaluate the policy on, at the same steps as the held-out data.

    Attributes:
      task: "loss", "choice", "gsm8k" or "ifeval", as the options of `jaxalign eval`; or the name of
        a task of lm-eval (extra `eval`).
      files: files of rows, for the first four.
      name: the name of its metrics, `eval/<name>/…`; None: the task's name. "loss" needs a name.
      limit: use only the first rows; None: all.
      batch: rows computed at a time.
      length: longest document, tokens.
      max_new_tokens: longest answer, tokens; lm-eval's tasks have their own limit.
      include_path: folder with more lm-eval tasks.
      num_fewshot: examples before each question of lm-eval; None: the task's own.
    """

    task: str
    files: tuple[str, ...] = ()
    name: str | None = None
    limit: int | None = None
    batch: int = 16
    length: int = 2048
    max_new_tokens: int = 512
    include_path: str | None = None
    num_fewshot: int | None = None

    def __post_init__(self):
        where = "run.eval_tasks"
        want(bool(self.task), f"{where}.task", self.task, "the name of a task")
        local = self.task in LOCAL
        wanted = "files of rows" if local else f"no files: only {', '.join(LOCAL)} read them"
        want(bool(self.files) == local, f"{where}.files of {self.task}", list(self.files), wanted)
        want(self.name is None or bool(self.name), f"{where}.name", self.name, "a name, or null")
        own = self.task != "loss" or self.name not in (None, "loss")
        wanted = "a name of its own: loss/nll is that of the held-out data"
        want(own, f"{where}.name of loss", self.name, wanted)
        for option in ("limit", "batch", "length", "max_new_tokens"):
            value = getattr(self, option)
            want(value is None or value > 0, f"{where}.{option}", value, "positive")
        for option in ("include_path", "num_fewshot"):
            value = getattr(self, option)
            want(not local or value is None, f"{where}.{option}", value, "null: it is for lm-eval")

    @property
    def title(self) -> str:
        """Of its figures."""
        return self.task if self.name is None else self.name
