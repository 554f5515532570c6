"""Conversations with placeholders in place of the messages' texts.

What a template does to a conversation depends on its shape (roles, calls, whitespace around texts)
and hardly ever on its words. So each shape is rendered once with short placeholders, and the words
are filled in. If the rendered text differs from the filled placeholders, the shortcut is not used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxalign.data.examples import Message
from jaxalign.data.presence import REASONING
from jaxalign.data.render import Chat, key_of

_TAGS = re.compile(r"(\s*</?think>\s*)")
_PLACEHOLDER = re.compile(r"Zq\d+x")


class Placeholders(NamedTuple):
    """A conversation in placeholders.

    Attributes:
      chat: the conversation; its `keys` tell its shape.
      values: placeholder → the text that it replaces.
    """

    chat: Chat
    values: dict[str, str]

    @property
    def short(self) -> bool:
        """Whether some text is too short to be found unambiguously."""
        return any(len(value) < 12 for value in self.values.values())


def placeholders_of(chat: Chat) -> Placeholders:
    """The shape of a conversation: placeholders for contents and reasoning, the rest unchanged."""
    values: dict[str, str] = {}

    def hide(text: str) -> str:
        pieces = []
        for piece in _TAGS.split(text):
            core = piece.strip()
            if not core or _TAGS.fullmatch(piece):
                pieces.append(piece)
                continue
            name = f"Zq{len(values):04d}x"
            values[name] = core
            first = piece.index(core)
            pieces.append(piece[:first] + name + piece[first + len(core) :])
        return "".join(pieces)

    messages: list[Message] = []
    for message in chat.messages:
        changed = dict(message)
        # Templates may parse tools' answers as JSON.
        if not message["content"].lstrip().startswith(("{", "[")):
            changed["content"] = hide(message["content"])
        for name in REASONING:
            if isinstance(message.get(name), str):
                changed[name] = hide(message[name])
        messages.append(changed)
    around = key_of({"tools": chat.tools, "kwargs": chat.kwargs, "thinking": chat.thinking})
    keys = (around, *(key_of(message) for message in messages))
    return Placeholders(chat._replace(messages=tuple(messages), keys=keys), values)


def filled(
    text: str, spans: Sequence[tuple[int, int]], shape: Placeholders, words: str
) -> list[tuple[int, int]] | None:
    """The spans of the real text, computed from the spans of the placeholder text.

    Returns:
      The spans, or None if the real text is not the filled placeholder text.
    """
    borders = sorted({border for span in spans for border in span})
    places: dict[int, int] = {}
    at = written = 0  # in `text` and in `words`
    waiting = iter(borders)
    border = next(waiting, None)
    for match in [*_PLACEHOLDER.finditer(text), None]:
        literal = text[at : match.start() if match else len(text)]
        if not words.startswith(literal, written):
            return None
        while border is not None and border <= at + len(literal):
            places[border] = written + border - at
            border = next(waiting, None)
        at, written = at + len(literal), written + len(literal)
        if match is None:
            break
        value = shape.values.get(match[0], match[0])
        if not words.startswith(value, written):
            return None
        if border is not None and border < match.end():
            return None  # inside a replaced text
        at, written = match.end(), written + len(value)
    if written != len(words):
        return None
    return [(places[first], places[last]) for first, last in spans]
