"""The forms of rows that hold a conversation to train on."""

from __future__ import annotations

from typing import Any

from jaxalign.data.columns import Form, template_kwargs_of, tools_of, with_system
from jaxalign.data.examples import Conversation, Messages
from jaxalign.data.fields import fail, fail_with, items, short, text, untyped
from jaxalign.data.files import Row
from jaxalign.data.meaning import ANSWERS, Untrained
from jaxalign.data.messages import read_messages, untrained
from jaxalign.data.names import flag, meaning_of
from jaxalign.data.transcripts import read_transcript
from jaxalign.data.turns import answer_of, pick, prompt_of

PROMPT = "prompt|instruction|question"


def _messages(row: Row) -> Conversation:
    key = pick(row.data, "messages", "conversations")
    messages = _flagged(row, read_messages(row.data[key], key, row.origin))
    return _conversation(row, with_system(row, messages), 0)


def _flagged(row: Row, messages: Messages) -> Messages:
    """Messages with the weights that a column lists for them, one for each."""
    for name in list(row.data):
        given = untyped(dict.get(row.data, name))
        meaning = meaning_of(name)
        if meaning not in ("weight", "no_weight") or not isinstance(given, list):
            continue
        flags = [flag(value) for value in items(row.data[name], name, row.origin, "0 or 1")]
        if len(flags) != len(messages) or None in flags:
            fail(row.origin, name, short(given), f"0 or 1 for each of {len(messages)} messages")
        messages = tuple(
            message | {"weight": 0}
            if message["role"] == "assistant" and on != (meaning == "weight")
            else message
            for message, on in zip(messages, flags, strict=True)
        )
    return messages


def _answered(row: Row, key: str, prompt: Messages) -> Messages:
    """The answer in a column, with the reasoning of a separate column."""
    thinking = text(row.data.get("thinking") or "", "thinking", row.origin, may_be_empty=True)
    return answer_of(row.data[key], key, row.origin, prompt, thinking)


def _completion(row: Row) -> Conversation:
    key = pick(row.data, *ANSWERS)
    prompt = prompt_of(row)
    return _conversation(row, prompt + _answered(row, key, prompt), len(prompt))


def _alpaca(row: Row) -> Conversation:
    prompt = prompt_of(row, "instruction")
    return _conversation(row, prompt + _answered(row, "output", prompt), 0)


def _gsm8k(row: Row) -> Conversation:
    prompt = prompt_of(row, "question")
    return _conversation(row, prompt + _answered(row, "answer", prompt), len(prompt))


def _seed_task(row: Row) -> Conversation:
    instances = items(
        row.data["instances"], "instances", row.origin, "objects with input and output"
    )
    if len(instances) != 1 or not isinstance(instances[0], dict) or "output" not in instances[0]:
        fail(
            row.origin,
            "instances",
            f"{len(instances)} instances",
            "one, with input and output",
            "write a row for each",
        )
    data: Any = row.data
    inner = {key: instances[0].get(key) for key in ("input", "output")}
    return _alpaca(Row(data.changed(inner), row.origin))


def _transcript(row: Row) -> Conversation:
    return _conversation(row, read_transcript(row.data["text"], "text", row.origin), 0)


def _conversation(row: Row, messages: Messages, first: int) -> Conversation:
    """The conversation, if it has something to train and something to answer."""
    context = untrained(messages, row.origin)
    kwargs = template_kwargs_of(row)
    made = Conversation(messages, row.origin, first, tools_of(row), context, template_kwargs=kwargs)
    if not made.trained_turns() and context:
        raise Untrained(
            row.origin,
            "messages: not to be trained",
            "messages: every answer is flagged as not to be trained; the row is left out",
        )
    if not made.trained_turns():
        fail_with(
            row.origin,
            "messages",
            "got no assistant turn, wanted at least one to train on",
            "add the answer or remove the row",
        )
    if messages[0]["role"] == "assistant":
        fail_with(
            row.origin,
            "messages[0]",
            "got an assistant turn, wanted a system or user turn before the first answer",
            "add it",
        )
    return made


CONVERSATIONS = (
    Form("messages", ("messages",), _messages),
    Form("sharegpt", ("conversations",), _messages),
    Form("completion", ("prompt", "completion|response"), _completion),
    Form("alpaca", ("instruction", "output"), _alpaca),
    Form("completion", ("instruction|question", "response"), _completion),
    Form("gsm8k", ("question", "answer"), _gsm8k),
    Form("seed_task", ("instruction", "instances"), _seed_task),
    Form("completion", (f"{PROMPT}|conversations|messages", "|".join(ANSWERS)), _completion),
)
# A transcript is also plain text, so this form must be named.
CONVERSATIONS += (Form("hh", ("text",), _transcript, by_name=True),)
