"""Prompts and answers from a row's columns, as messages."""

from __future__ import annotations

from typing import Any

from jaxalign.data.columns import is_listed, with_system
from jaxalign.data.examples import Message, Messages
from jaxalign.data.fields import fail, fail_with, items, short, text
from jaxalign.data.files import Row
from jaxalign.data.meaning import PROMPTS, Untrained
from jaxalign.data.messages import is_messages, read_messages, same_turn, untrained
from jaxalign.data.transcripts import is_transcript, read_transcript, without_open_answer


def has_prompt(row: Row) -> bool:
    """Whether a row has a prompt in a separate column."""
    return any(dict.get(row.data, column) is not None for column in PROMPTS)


def pick(data: dict[str, Any], *names: str) -> str:
    """Which of several columns a row uses: the first that is not null, else the first existing."""
    filled = [name for name in names if dict.get(data, name) is not None]
    return next(iter(filled or [name for name in names if name in data]))


def prompt_of(row: Row, *first: str) -> Messages:
    """The messages of a row's prompt; columns in `first` take precedence over the others."""
    data, origin = row
    key = pick(data, *first, *PROMPTS)
    if key == "instruction":
        return alpaca_prompt(row)
    if key in ("conversations", "messages"):
        return with_system(row, read_messages(data[key], key, origin))
    return with_system(row, _with_context(row, _text_or_messages(data[key], key, origin)))


def alpaca_prompt(row: Row) -> Messages:
    """`system`, `history` and `instruction` + `input` as messages."""
    data, origin = row
    messages: list[Message] = []
    history = data.get("history")
    if history is not None and history != "" and not is_listed(history):
        fail(origin, "history", short(history), "a list of pairs")
    pairs = (
        items(history, "history", origin, "pairs") if history not in (None, "", [], "[]") else []
    )
    for number, pair in enumerate(pairs):
        if not isinstance(pair, list) or len(pair) != 2:
            fail(origin, f"history[{number}]", short(pair), "[question, answer]")
        for role, turn in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text(turn, f"history[{number}]", origin)})
    parts = _contexts(row)
    # Some data sets put the whole task into `input` and leave the instruction empty.
    instruction = text(data["instruction"], "instruction", origin, may_be_empty=bool(parts))
    parts = [instruction, *parts] if instruction.strip() else parts
    messages.append({"role": "user", "content": "\n".join(parts)})
    return with_system(row, tuple(messages))


def _contexts(row: Row) -> list[str]:
    """The texts in `input` and `context` beside a prompt; equal texts count once."""
    parts: list[str] = []
    for key in ("input", "context"):
        if dict.get(row.data, key) is None:
            continue
        extra = text(row.data[key], key, row.origin, may_be_empty=True)
        if extra.strip() and extra not in parts:
            parts.append(extra)
    return parts


def _with_context(row: Row, messages: Messages) -> Messages:
    """A prompt of one user turn, followed by its context unless it already holds it."""
    if len(messages) != 1 or not any(_filled(row.data, key) for key in ("input", "context")):
        return messages
    prompt = messages[0]["content"]
    parts = [part for part in _contexts(row) if part.strip() not in prompt]
    return ({"role": "user", "content": "\n".join([prompt, *parts])},)


def _filled(data: dict[str, Any], key: str) -> bool:
    value = dict.get(data, key)
    return isinstance(value, str) and bool(value.strip())


def answer_of(
    value: Any, key: str, origin: str, prompt: Messages = (), thinking: str = ""
) -> Messages:
    """An answer as a string or messages; a prompt repeated before it is removed.

    `thinking` is the reasoning from a separate column.
    """
    if not is_messages(value):
        message: Message = {"role": "assistant", "content": text(value, key, origin)}
        if thinking.strip() and thinking.strip() not in message["content"]:
            message["reasoning_content"] = thinking
        return (message,)
    messages = read_messages(value, key, origin)
    start = messages[: len(prompt)]
    if prompt and len(start) == len(prompt) and all(map(same_turn, start, prompt)):
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant":
        got = f"a {messages[0]['role']} turn" if messages else "nothing"
        fail_with(origin, key, f"got {got} after the prompt, wanted the assistant's answer")
    check_last(messages, key, origin)
    return messages


def check_last(messages: Messages, key: str, origin: str) -> None:
    """Raises an error if the answer does not end with an assistant turn."""
    role = messages[-1]["role"]
    if role != "assistant":
        fail_with(origin, key, f"ends with a {role} turn, wanted the assistant's answer")


def check_trained(messages: Messages, key: str, origin: str) -> None:
    """Raises `Untrained` if a turn of a compared answer is flagged as not to be trained."""
    if untrained(messages, origin):
        raise Untrained(
            origin,
            f"{key}: not to be trained",
            f"{key}: a turn is flagged as not to be trained; the row is left out",
        )


def _text_or_messages(value: Any, key: str, origin: str) -> Messages:
    if is_messages(value):
        return read_messages(value, key, origin)
    if is_transcript(value) and "\n\nAssistant:" in value:
        return without_open_answer(read_transcript(value, key, origin))
    return ({"role": "user", "content": text(value, key, origin)},)
