"""Prompts without a separate column: transcripts, and the common prefix of two texts."""

from __future__ import annotations

import re
from typing import Any

from jaxalign.data.examples import Message, Messages
from jaxalign.data.fields import fail, fail_with, text
from jaxalign.data.messages import same_turn

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):[ \t]?")
_ROLE = {"Human": "user", "Assistant": "assistant"}


def is_transcript(value: Any) -> bool:
    """Whether a text is an HH-RLHF transcript: it starts with a turn of either speaker."""
    return isinstance(value, str) and bool(re.match(r"\s*(Human|Assistant):", value))


def read_transcript(value: Any, key: str, origin: str) -> Messages:
    r"""Turns of `\n\nHuman: … \n\nAssistant: …` (Bai et al. 2022, arXiv:2204.05862).

    Turns may be empty, and a speaker may have several in a row: both are in the published data. A
    last `Assistant:` without text is not a turn but the place for the answer.
    """
    whole = text(value, key, origin).strip()
    marks = list(_TURN.finditer(whole))
    if not marks or marks[0].start():
        fail(origin, key, repr(whole[:30]), "a transcript that starts with 'Human:'")
    ends = [mark.start() for mark in marks[1:]] + [len(whole)]
    return tuple(
        {"role": _ROLE[mark[1]], "content": whole[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    )


def without_open_answer(messages: Messages) -> Messages:
    """A transcript as a prompt: without the empty turn at its end."""
    last: Message = messages[-1]
    open_ = last["role"] == "assistant" and not last["content"]
    return messages[:-1] if open_ and len(messages) > 1 else messages


def split_messages(chosen: Messages, rejected: Messages, origin: str) -> int:
    """How many turns two conversations have in common.

    The last turn of each is excluded: it is the answer, even if both are the same.
    """
    common, least = 0, min(len(chosen), len(rejected)) - 1
    while common < least and same_turn(chosen[common], rejected[common]):
        common += 1
    if common == 0:
        fail_with(
            origin,
            "chosen and rejected",
            "their first messages differ, so there is no common prompt",
            "give a column prompt, or lists with the same start",
        )
    return common


def split_texts(chosen: str, rejected: str, origin: str) -> int:
    """Where two texts diverge, cut back to the border of a word.

    At a border, a character on one side is neither letter nor digit. A space before an answer
    belongs to the answer, where tokenizers put it. Chinese, which does not separate words, is cut
    back to the last punctuation mark or space.
    """
    pairs = enumerate(zip(chosen, rejected, strict=False))
    least = min(len(chosen), len(rejected)) - 1
    at = min(least, next((n for n, (a, b) in pairs if a != b), least))
    while at > 0 and not (_border(chosen, at) and _border(rejected, at)):
        at -= 1
    if at > 0 and chosen[at - 1] == " ":
        at -= 1
    if not chosen[:at].strip() or not chosen[at:].strip() or not rejected[at:].strip():
        fail_with(
            origin,
            "prompt",
            "missing, and chosen and rejected have no start in common",
            "give the prompt as a column of its own, or chosen and rejected as lists of messages "
            "that start with it",
        )
    return at


def _border(words: str, at: int) -> bool:
    """Whether no word crosses this position, and the rest is not only whitespace."""
    return not (words[at - 1].isalnum() and words[at].isalnum()) and bool(words[at:].strip())
