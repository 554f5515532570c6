"""Checks that every turn of a conversation is in its rendered text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from jaxalign.data.examples import Message, RowError
from jaxalign.data.render import Chat

LEFT_OUT = "the chat template leaves out a turn"
"""The reason of the error."""

REASONING = ("reasoning_content", "thinking")
"""The fields of a message in which templates read reasoning."""

_OPEN, _CLOSE = "<think>", "</think>"


def split_reasoning(message: Message) -> tuple[str, str]:
    """Reasoning and answer of a message, stripped of whitespace."""
    before, closing, after = message["content"].rpartition(_CLOSE)
    apart = next((message[name].strip() for name in REASONING if name in message), "")
    if not closing:
        return apart, message["content"].strip()
    inside = before.strip().removeprefix(_OPEN).strip()
    return (apart if apart else inside), after.strip()


def reasons(message: Message) -> bool:
    """Whether an answer begins with reasoning."""
    return bool(split_reasoning(message)[0])


def without_reasoning(message: Message) -> Message:
    """An answer without its reasoning, whether in a separate field or in `<think>`."""
    answer = {key: value for key, value in message.items() if key not in REASONING}
    return answer | {"content": split_reasoning(message)[1]}


def check_turns(chat: Chat, size: int, text: str) -> None:
    """Raises an error for a text in which a turn is missing.

    Args:
      chat: the conversation.
      size: how many of its messages the text should hold. Reasoning of earlier answers may be
        missing, because generation does not see it either.
      text: the rendered text.

    Raises:
      RowError: a turn is missing; the message names the first turn not found after the turn before
        it.
    """
    at = 0
    for number, message in enumerate(chat.messages[:size]):
        # Some templates put the system text into another turn.
        end = find_content(message, text, 0 if message["role"] == "system" else at)
        if end is None:
            raise RowError(
                chat.origin,
                LEFT_OUT,
                f"messages[{number}] ({message['role']}) is not in what the chat template writes; "
                "pass a chat_template that writes it, such as 'chatml', or remove the turn",
            )
        at = at if message["role"] == "system" else end


def find_content(message: Message, text: str, start: int) -> int | None:
    """The end of a message in a text, searched from `start` on; None if it is not found.

    It looks for the content (or the answer after its reasoning) and the names and arguments of
    calls, each character for character, as JSON writes it, or word for word.
    """
    content = message["content"]
    if message["role"] == "assistant":
        content = split_reasoning(message)[1]
    end = _find(content.strip(), text, start)
    if end is None:
        return None
    for call in message.get("tool_calls", ()):
        last = _find_call(call["function"], text, start)
        if last is None:
            return None
        end = max(end, last)
    return end


def _find_call(call: dict[str, Any], text: str, start: int) -> int | None:
    end = _find(call["name"], text, start)
    for part in _leaves(call.get("arguments", {})) if end is not None else ():
        place = _find(part, text, start)
        if place is None:
            return None
        end = max(end or 0, place)
    return end


def _leaves(value: Any) -> Iterator[str]:
    """The texts among the arguments of a call."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield str(name)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)


def _find(part: str, text: str, start: int) -> int | None:
    if not part:
        return start
    for form in dict.fromkeys((part, json.dumps(part, ensure_ascii=False)[1:-1])):
        place = text.find(form, start)
        if place >= 0:
            return place + len(form)
    place = text.find(json.dumps(part)[1:-1], start)
    if place >= 0:
        return place + len(json.dumps(part)) - 2
    at = start
    for word in re.findall(r"\w+", part):
        place = text.find(word, at)
        if place < 0:
            return None
        at = place + len(word)
    return at if at > start else None
