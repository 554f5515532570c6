"""Which answers of a conversation are trained: the constructions of the literature, by name.

| `train_on` | what is trained |
| --- | --- |
| `all` | every assistant turn, each after the turns before it (Vicuna; the default) |
| `last` | only the last assistant turn; what came before is its prompt |
| `split` | every assistant turn as an example of its own, with the turns before it as its prompt |
| `everything` | all tokens: those of prompts, headers and ends of turns too |

`all` and `split` train the same answers with the same weight a token. `all` reads a conversation
once, `split` once a turn, which is what a template needs that writes earlier turns anew.
"""

from __future__ import annotations

from jaxalign.data.examples import TRAIN_ON, Conversation, TrainOn


def select(conversation: Conversation, train_on: TrainOn = "all") -> list[Conversation]:
    """The conversations to train instead of one, by `train_on`.

    Turns that the row itself keeps from training (`weight: 0`, a prompt's) stay untrained, but for
    "everything".

    Raises:
      ValueError: an unknown `train_on`.
    """
    turns = conversation.trained_turns()
    if train_on == "all":
        return [conversation]
    if train_on == "last":
        return [up_to(conversation, turns[-1])]
    if train_on == "split":
        return [up_to(conversation, at) for at in turns]
    if train_on == "everything":
        return [conversation._replace(everything=True)]
    raise ValueError(f"train_on: got {train_on!r}, wanted one of {', '.join(TRAIN_ON)}")


def up_to(conversation: Conversation, at: int) -> Conversation:
    """The conversation that ends with one turn, the only one that is trained."""
    return conversation._replace(messages=conversation.messages[: at + 1], trained_from=at)
