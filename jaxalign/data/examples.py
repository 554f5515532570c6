"""Examples: the meaning of a data row, independent of its form.

There is one type for each kind of training signal. `jaxalign.data.rows` reads rows into them,
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
    """Messages; the assistant's turns are trained.

    Attributes:
      messages: the turns.
      origin: `file:line`.
      trained_from: assistant turns before this index are only context (turns of a prompt).
      tools: descriptions of functions that the template shows to the model.
      untrained: indices of other assistant turns that are only context (`weight: 0`).
      everything: all tokens are trained, including prompts and headers.
      template_kwargs: variables that the chat template gets for this row, or None.
      thinking: whether the answers follow the template's prompt for reasoning; None: each answer
        that begins with reasoning does.
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
      rejected: the other answer.
      margin: how much better the chosen answer is; None if the row does not say.
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
    """Messages that wait for an answer.

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
      ranks: one number per answer, larger is better; answers with equal ranks are not compared.
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
      scores: attribute → score, for the attributes that the row has.
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
      labels: one number in [0, 1] per step; 1 is right.
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
    """A fault in one row; the rows after it can still be read.

    Attributes:
      origin: `file:line`.
      reason: the fault without location and values, for counting: `completion: empty text`.
    """

    def __init__(self, origin: str, reason: str, message: str):
        super().__init__(f"{origin}: {message}")
        self.origin = origin
        self.reason = reason
