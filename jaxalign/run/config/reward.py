"""The configuration of `jaxalign reward`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import reward
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import want


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardRun(Run):
    """`jaxalign reward`.

    The model may be a base model, a fine-tuned one, or another reward model.

    Attributes:
      reward: the algorithm's options.
      head: "pretrained" keeps the head of a reward model (a language model has none and gets a new
        one); "fresh" keeps only a reward model's body, for another objective.
      answers: the most answers in a ranking; None: the size of the largest ranking.
    """

    reward: reward.Config = reward.Config()
    head: str = "pretrained"
    answers: int | None = None

    algorithm: ClassVar[str] = "reward"
    data_options: ClassVar[tuple[str, ...]] = ("shared_prefix",)

    def __post_init__(self):
        super().__post_init__()
        tasks = [task.title for task in self.run.eval_tasks]
        want(not tasks, "run.eval_tasks", tasks, "none: a reward model writes no answers")
        want(self.head in ("pretrained", "fresh"), "head", self.head, "pretrained or fresh")
        objective, answers = self.reward.objective, self.answers
        want(answers is None or answers > 1, "answers", answers, "at least 2, or null")
        want(
            answers is None or objective == "ranking",
            "answers",
            answers,
            "null, or reward.objective=ranking",
        )
        for name in ("packing", "shared_prefix"):
            want(
                not getattr(self.data, name) or objective == "pairs",
                f"data.{name}",
                getattr(self.data, name),
                f"false with reward.objective={objective}: its rows hold one answer each",
            )
