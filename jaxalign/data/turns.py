"""Prompts and answers out of a row's columns, as messages."""

from __future__ import annotations

from typing import Any

from jaxalign.data.columns import is_listed, with_system
from jaxalign.data.examples import Message, Messages
from jaxalign.data.fields import fail, fail_with, items, short, text
from jaxalign.data.files import Row
from jaxalign.data.messages import is_messages, read_messages
from jaxalign.data.transcripts import is_transcript, read_transcript, without_open_answer

PROMPTS = ("prompt", "instruction", "question", "conversations", "messages")
"""The columns that may hold a prompt; the first that a row has is taken."""


def has_prompt(row: Row) -> bool:
    """Whether a row has a prompt in a column of its own."""
    return any(row.data.get(column) is not None for column in PROMPTS)


def prompt_of(row: Row) -> Messages:
    """The messages of a row's prompt."""
    data, origin = row
    there = [column for column in PROMPTS if data.get(column) is not None]
    key = next(iter(there or [column for column in PROMPTS if column in data]))
    if key == "instruction":
        return alpaca_prompt(row)
    if key in ("conversations", "messages"):
        return with_system(row, read_messages(data[key], key, origin))
    return with_system(row, _text_or_messages(data[key], key, origin))


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
        for role, said in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": text(said, f"history[{number}]", origin)})
    parts = [text(data["instruction"], "instruction", origin)]
    if data.get("input") is not None:
        extra = text(data["input"], "input", origin, may_be_empty=True)
        parts += [extra] if extra.strip() else []
    messages.append({"role": "user", "content": "\n".join(parts)})
    return with_system(row, tuple(messages))


def answer_of(value: Any, key: str, origin: str, prompt: Messages = ()) -> Messages:
    """An answer as a string or messages; a prompt repeated before it is taken off."""
    if not is_messages(value):
        return ({"role": "assistant", "content": text(value, key, origin)},)
    messages = read_messages(value, key, origin)
    if prompt and messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if not messages or messages[0]["role"] != "assistant":
        got = f"a {messages[0]['role']} turn" if messages else "nothing"
        fail_with(origin, key, f"got {got} after the prompt, wanted the assistant's answer")
    check_last(messages, key, origin)
    return messages


def check_last(messages: Messages, key: str, origin: str) -> None:
    """Refuses an answer that ends with someone else's turn."""
    role = messages[-1]["role"]
    if role != "assistant":
        fail_with(origin, key, f"ends with a {role} turn, wanted the assistant's answer")


def _text_or_messages(value: Any, key: str, origin: str) -> Messages:
    if is_messages(value):
        return read_messages(value, key, origin)
    if is_transcript(value) and "\n\nAssistant:" in value:
        return without_open_answer(read_transcript(value, key, origin))
    return ({"role": "user", "content": text(value, key, origin)},)
