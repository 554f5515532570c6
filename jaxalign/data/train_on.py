"""Which answers of a conversation are trained: the methods of the literature, by name.

| `train_on` | what is trained |
| --- | --- |
| `all` | every assistant turn, each after the turns before it (Vicuna; the default) |
| `last` | only the last assistant turn; what came before is its prompt |
| `split` | every assistant turn as a separate example, with the turns before it as its prompt |
| `everything` | all tokens, including prompts, headers and ends of turns |

`all` and `split` train the same answers with the same weight per token. `all` reads a conversation
once, `split` once per turn, which templates that rewrite earlier turns need.
"""

from __future__ import annotations

from jaxalign.data.examples import TRAIN_ON, Conversation, TrainOn


def select(conversation: Conversation, train_on: TrainOn = "all") -> list[Conversation]:
    """The conversations to train on in place of one, by `train_on`.

    Turns that the row excludes from training (`weight: 0`, or turns of a prompt) stay untrained,
    except with "everything".

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
    """The conversation up to one turn, which is the only one that is trained."""
    return conversation._replace(messages=conversation.messages[: at + 1], trained_from=at)
