"""Examples: what a row of data means, whatever form it came in.

One type for each thing that can be learnt from. `jaxalign.data.rows` reads rows into them,
`jaxalign.data.chat` turns them into tokens. `origin` is always `file:line`.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

Message = dict[str, Any]
Messages = tuple[Message, ...]
Tools = tuple[dict[str, Any], ...]

ROLES = ("system", "user", "assistant", "tool")

TrainOn = Literal["all", "last", "split", "everything"]
TRAIN_ON: tuple[TrainOn, ...] = ("all", "last", "split", "everything")
"""Which tokens of a conversation are trained; see `jaxalign.data.train_on`."""


class Conversation(NamedTuple):
    """Messages of which the assistant's are trained.

    Attributes:
      messages: the turns.
      origin: `file:line`.
      trained_from: assistant turns before this index are context only (turns of a prompt).
      tools: descriptions of functions that the template shows to the model.
      untrained: indices of further assistant turns that are context only (`weight: 0`).
      everything: all tokens are trained, those of prompts and headers too.
      template_kwargs: variables that the chat template gets for this row, or None.
      thinking: whether the answers follow the prompt of answers that begin with reasoning; None:
        each as it begins itself.
    """

    messages: Messages
    origin: str
    trained_from: int = 0
    tools: Tools = ()
    untrained: tuple[int, ...] = ()
    everything: bool = False
    template_kwargs: dict[str, Any] | None = None
    thinking: bool | None = None

    def trained_turns(self) -> tuple[int, ...]:
        """The indices of the messages that are trained."""
        return tuple(
            at
            for at in range(self.trained_from, len(self.messages))
            if self.messages[at]["role"] == "assistant" and at not in self.untrained
        )


class Preference(NamedTuple):
    """Two answers to one prompt, the first preferred.

    Attributes:
      prompt: the messages before the answers.
      chosen: the preferred answer, one or more messages.
      rejected: the other.
      margin: how much better chosen is, or None where the row does not say.
      origin: `file:line`.
      tools: descriptions of functions that the template shows to the model.
      template_kwargs: variables that the chat template gets for this row, or None.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None
    origin: str
    tools: Tools = ()
    template_kwargs: dict[str, Any] | None = None


class Prompt(NamedTuple):
    """Messages that await an answer.

    Attributes:
      messages: the turns; the last is not the assistant's.
      origin: `file:line`.
      row: the whole row, for reward functions that need its other columns.
      tools: descriptions of functions that the template shows to the model.
      template_kwargs: variables that the chat template gets for this row, or None.
    """

    messages: Messages
    origin: str
    row: dict[str, Any]
    tools: Tools = ()
    template_kwargs: dict[str, Any] | None = None


class Text(NamedTuple):
    """Plain text, trained as it is.

    Attributes:
      text: the document.
      origin: `file:line`.
    """

    text: str
    origin: str


class Unpaired(NamedTuple):
    """One answer, marked as desirable or not (KTO).

    Attributes:
      prompt: the messages before the answer.
      answer: one or more messages.
      desirable: whether it is a good answer.
      origin: `file:line`.
      tools: descriptions of functions that the template shows to the model.
      template_kwargs: variables that the chat template gets for this row, or None.
    """

    prompt: Messages
    answer: Messages
    desirable: bool
    origin: str
    tools: Tools = ()
    template_kwargs: dict[str, Any] | None = None


class Ranked(NamedTuple):
    """Several answers to one prompt, in an order of preference.

    Attributes:
      prompt: the messages before the answers.
      answers: two or more answers, each one or more messages.
      ranks: one number an answer, larger is better; equal ones say nothing about each other.
      origin: `file:line`.
      tools: descriptions of functions that the template shows to the model.
      template_kwargs: variables that the chat template gets for this row, or None.
    """

    prompt: Messages
    answers: tuple[Messages, ...]
    ranks: tuple[float, ...]
    origin: str
    tools: Tools = ()
    template_kwargs: dict[str, Any] | None = None


class Graded(NamedTuple):
    """One answer with a score for each of several attributes.

    Attributes:
      prompt: the messages before the answer.
      answer: one or more messages.
      scores: attribute → score, those that the row gives.
      origin: `file:line`.
      tools: descriptions of functions that the template shows to the model.
      template_kwargs: variables that the chat template gets for this row, or None.
    """

    prompt: Messages
    answer: Messages
    scores: dict[str, float]
    origin: str
    tools: Tools = ()
    template_kwargs: dict[str, Any] | None = None


class Steps(NamedTuple):
    """An answer in steps of reasoning, each labelled (process rewards).

    Attributes:
      prompt: the messages before the answer.
      steps: the texts of the steps, in order; together they are the answer.
      labels: one number in [0, 1] a step; 1 is right.
      origin: `file:line`.
      template_kwargs: variables that the chat template gets for this row, or None.
    """

    prompt: Messages
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    origin: str
    template_kwargs: dict[str, Any] | None = None


Example = Conversation | Preference | Prompt | Text | Unpaired | Ranked | Graded | Steps


class RowError(ValueError):
    """What is wrong with one row; the rows after it can still be read.

    Attributes:
      origin: `file:line`.
      reason: the fault without place and values, for counting: `completion: empty text`.
    """

    def __init__(self, origin: str, reason: str, message: str):
        super().__init__(f"{origin}: {message}")
        self.origin = origin
        self.reason = reason
