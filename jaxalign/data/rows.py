"""From rows to examples: the forms that alignment data comes in, recognised by their columns.

| form | columns |
| --- | --- |
| conversation | `messages` |
| prompt and completion | `prompt`, `completion` (strings or lists of messages) |
| Alpaca | `instruction`, `output`, optional `input`, `system`, `history` (pairs of strings) |
| preference | `chosen`, `rejected` with `prompt` or `instruction` (strings or lists of messages) |
| preference, implicit prompt | `chosen`, `rejected`: whole conversations with a common start |
| prompt only | `prompt`, `instruction` (+ `input`), or `messages` that await an answer |

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`; other keys of a
message go to the chat template as they are. A row that fits no form is an error, never skipped.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn

from jaxalign.data.sources import Row

Message = dict[str, Any]
Messages = tuple[Message, ...]

ROLES = ("system", "user", "assistant", "tool")


class Conversation(NamedTuple):
    """Messages of which the assistant's are trained.

    Attributes:
      messages: the turns.
      origin: `file:line`.
      trained_from: assistant turns before this index are context only (turns of a prompt).
    """

    messages: Messages
    origin: str
    trained_from: int = 0


class Preference(NamedTuple):
    """Two answers to one prompt, the first preferred.

    Attributes:
      prompt: the messages before the answers.
      chosen: the preferred answer, one or more messages.
      rejected: the other.
      margin: how much better chosen is, or None where the row does not say.
      origin: `file:line`.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: float | None
    origin: str


class Prompt(NamedTuple):
    """Messages that await an answer.

    Attributes:
      messages: the turns; the last is not the assistant's.
      origin: `file:line`.
      row: the whole row, for reward functions that need its other columns.
    """

    messages: Messages
    origin: str
    row: dict[str, Any]


def to_conversation(row: Row) -> Conversation:
    """Reads a row of the forms conversation, prompt and completion, or Alpaca.

    Raises:
      ValueError: the row has none of these forms, a column is missing, of the wrong type or empty,
        or no assistant turn is left to train. It names `file:line` and the column.
    """
    data, origin = row
    if "messages" in data:
        messages = read_messages(data["messages"], "messages", origin)
        first = 0
    elif "prompt" in data and "completion" in data:
        messages = _prompt(row)
        first = len(messages)
        messages += _answer(data["completion"], "completion", origin)
    elif "instruction" in data and "output" in data:
        messages = _alpaca_prompt(row) + _answer(data["output"], "output", origin)
        first = 0
    else:
        wanted = "messages, prompt + completion, or instruction + output"
        if "chosen" in data:
            wanted += " (this is a preference pair: train a reward model or DPO with it)"
        _unknown_form(row, wanted)
    if not any(message["role"] == "assistant" for message in messages[first:]):
        raise ValueError(
            f"{origin}: messages: got no assistant turn, wanted at least one to train on; "
            "add the answer or remove the row"
        )
    if messages[0]["role"] == "assistant":
        raise ValueError(
            f"{origin}: messages[0]: got an assistant turn, wanted a system or user turn before "
            "the first answer; add it"
        )
    return Conversation(messages, origin, first)


def to_preference(row: Row) -> Preference:
    """Reads a preference row.

    The prompt is `prompt`, else `instruction` (+ `input`), else the longest common start of the
    lists `chosen` and `rejected`. Lists that repeat the given prompt at their start are accepted.

    Raises:
      ValueError: a column is missing, of the wrong type or empty. It names `file:line` and column.
    """
    data, origin = row
    for key in ("chosen", "rejected"):
        if key not in data:
            _unknown_form(row, f"a preference with the column {key!r}")
    if "prompt" in data or "instruction" in data:
        prompt = _prompt(row) if "prompt" in data else _alpaca_prompt(row)
        chosen = _answer(data["chosen"], "chosen", origin, prompt)
        rejected = _answer(data["rejected"], "rejected", origin, prompt)
    else:
        if not isinstance(data["chosen"], list) or not isinstance(data["rejected"], list):
            raise ValueError(
                f"{origin}: prompt: missing; wanted it as a column of its own, or chosen and "
                "rejected as lists of messages that start with it"
            )
        chosen = read_messages(data["chosen"], "chosen", origin)
        rejected = read_messages(data["rejected"], "rejected", origin)
        common = 0
        # Each side keeps its last message: that is the answer, even where both are the same.
        while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
            common += 1
        if common == 0:
            raise ValueError(
                f"{origin}: chosen and rejected: their first messages differ, so there is no "
                "common prompt; wanted a column prompt, or lists with the same start"
            )
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise ValueError(
                f"{origin}: {key}: ends with a {answer[-1]['role']} turn, wanted the assistant's "
                "answer; correct or remove the row"
            )
    margin = data.get("margin")
    if margin is not None and (
        isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin)
    ):
        raise ValueError(f"{origin}: margin: got {margin!r}, wanted a finite number; correct it")
    return Preference(prompt, chosen, rejected, None if margin is None else float(margin), origin)


def to_prompt(row: Row) -> Prompt:
    """Reads the prompt of a row; its other columns stay available in `Prompt.row`.

    Raises:
      ValueError: no prompt column, of the wrong type or empty, or the assistant has the last word.
    """
    data, origin = row
    if "prompt" in data:
        messages = _prompt(row)
    elif "instruction" in data:
        messages = _alpaca_prompt(row)
    elif "messages" in data:
        messages = read_messages(data["messages"], "messages", origin)
    else:
        _unknown_form(row, "prompt, instruction, or messages that await an answer")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{origin}: the last message is the assistant's, wanted messages that await an answer; "
            "remove the answer"
        )
    return Prompt(messages, origin, data)


def read_messages(value: Any, key: str, origin: str) -> Messages:
    """Checks a list of messages.

    Args:
      value: what the row holds.
      key: the column, for errors.
      origin: `file:line`, for errors.

    Raises:
      ValueError: not a list of objects with a known role and text as content; a user or assistant
        turn without text.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{origin}: {key}: got {_short(value)}, wanted a list of messages")
    for number, message in enumerate(value):
        at = f"{key}[{number}]"
        if not isinstance(message, dict):
            raise ValueError(
                f"{origin}: {at}: got {_short(message)}, wanted an object with role and content"
            )
        for field in ("role", "content"):
            if field not in message:
                raise ValueError(
                    f"{origin}: {at}.{field}: missing; add it (found: {_keys(message)})"
                )
        if message["role"] not in ROLES:
            raise ValueError(
                f"{origin}: {at}.role: got {_short(message['role'])}, wanted one of "
                f"{', '.join(ROLES)}"
            )
        may_be_empty = message["role"] in ("system", "tool")
        _text(message["content"], f"{at}.content", origin, may_be_empty=may_be_empty)
    return tuple(dict(message) for message in value)


def _text(value: Any, key: str, origin: str, may_be_empty: bool = False) -> str:
    """Checks a string."""
    if not isinstance(value, str):
        raise ValueError(f"{origin}: {key}: got {_short(value)}, wanted text; correct the row")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{origin}: {key}: got empty text; write it or remove the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(
            f"{origin}: {key}: holds half of a surrogate pair (as \\ud83d alone), which is no "
            "character; correct the row"
        ) from None
    return value


def _prompt(row: Row) -> Messages:
    """The column `prompt`, a string or messages."""
    value = row.data["prompt"]
    if isinstance(value, list):
        return read_messages(value, "prompt", row.origin)
    return ({"role": "user", "content": _text(value, "prompt", row.origin)},)


def _alpaca_prompt(row: Row) -> Messages:
    """`system`, `history` and `instruction` + `input` as messages."""
    data, origin = row
    messages: list[Message] = []
    if data.get("system"):
        messages.append({"role": "system", "content": _text(data["system"], "system", origin)})
    history = data.get("history")
    if history is not None and not isinstance(history, list):
        raise ValueError(f"{origin}: history: got {_short(history)}, wanted a list of pairs")
    for number, pair in enumerate(history if history is not None else []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(
                f"{origin}: history[{number}]: got {_short(pair)}, wanted [question, answer]"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            content = _text(text, f"history[{number}]", origin)
            messages.append({"role": role, "content": content})
    parts = [_text(data["instruction"], "instruction", origin)]
    if data.get("input") is not None:
        extra = _text(data["input"], "input", origin, may_be_empty=True)
        parts += [extra] if extra.strip() else []
    messages.append({"role": "user", "content": "\n".join(parts)})
    return tuple(messages)


def _answer(value: Any, key: str, origin: str, prompt: Messages = ()) -> Messages:
    """An answer as a string or messages; a repeated prompt before it is taken off."""
    if not isinstance(value, list):
        return ({"role": "assistant", "content": _text(value, key, origin)},)
    messages = read_messages(value, key, origin)
    if prompt and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant":
        got = f"a {messages[0]['role']} turn" if messages else "nothing"
        raise ValueError(
            f"{origin}: {key}: got {got} after the prompt, wanted the assistant's answer; "
            "correct or remove the row"
        )
    return messages


def _unknown_form(row: Row, wanted: str) -> NoReturn:
    raise ValueError(f"{row.origin}: got the columns {_keys(row.data)}, wanted {wanted}")


def _keys(data: dict[str, Any]) -> str:
    return ", ".join(str(key) for key in data) if data else "none"


def _short(value: Any) -> str:
    """A value as it appears in an error."""
    if isinstance(value, str):
        return repr(value if len(value) <= 30 else value[:30] + "…")
    if isinstance(value, list | tuple | dict):
        return f"{'an empty' if not value else 'a'} {type(value).__name__}"
    return repr(value)[:40] if value is not None else "null"
