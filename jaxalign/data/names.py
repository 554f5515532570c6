"""The names that common data sets give to columns, message fields and speakers.

docs/data.md documents the tables. Names are compared in lower case with `_` between words, so that
`systemPrompt`, `System Prompt` and `system-prompt` are all `system_prompt`.
"""

from __future__ import annotations

import functools
import re
from typing import Any

COLUMNS: dict[str, tuple[str, ...]] = {
    "prompt": (
        *("prompt", "instruction", "question", "query", "problem", "request", "user", "human"),
        *("user_prompt", "user_input", "user_query", "user_message", "inputs", "input_text"),
    ),
    "system": (
        *("system", "system_prompt", "system_message", "system_instruction", "system_text"),
        *("sys_prompt", "sys", "systemprompt"),
    ),
    "context": (
        *("context", "input", "passage", "document", "documents", "background", "article"),
        *("paragraph", "evidence", "contexts"),
    ),
    "completion": (
        *("completion", "response", "output", "answer", "reply", "solution", "target", "targets"),
        *("assistant", "assistant_response", "gpt", "bot", "model_output", "output_text"),
        *("generation", "answer_text"),
    ),
    "thinking": (
        *("thinking", "reasoning", "reasoning_content", "thought", "thoughts", "think", "cot"),
        *("chain_of_thought", "rationale", "reasoning_text", "thinking_content"),
    ),
    "weight": (
        *("weight", "loss_weight", "loss", "train", "trainable", "trained", "training"),
        *("loss_mask", "loss_scale", "is_trained", "is_trainable", "should_train", "use_loss"),
        *("compute_loss", "has_loss", "train_on", "learn"),
    ),
    "no_weight": (
        *("untrained", "no_train", "do_not_train", "skip_training", "no_loss", "ignore_loss"),
        *("mask_loss", "masked", "is_masked", "ignore"),
    ),
    "tools": ("tools", "functions", "available_tools", "tool_list"),
    "messages": ("messages", "conversations", "conversation", "dialogue", "dialog", "chat"),
}
"""The meaning of a column → its names. `input` is a context if there is a prompt, else the prompt.

`weight` false or 0, and `no_weight` true or 1, keep a row, or a message, from being trained.
"""

FIELDS: dict[str, tuple[str, ...]] = {
    "role": ("role", "from", "speaker", "author", "sender"),
    "content": ("content", "value", "text", "utterance", "message"),
    "reasoning_content": COLUMNS["thinking"],
    "tool_calls": ("tool_calls", "toolcalls"),
    "function_call": ("function_call",),
    "tool_call_id": ("tool_call_id",),
    "weight": COLUMNS["weight"],
    "no_weight": COLUMNS["no_weight"],
}
"""A field of a message → its names; the first that a message has is read."""

SPEAKERS: dict[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "customer"),
    "assistant": (
        *("assistant", "gpt", "chatgpt", "bot", "ai", "model", "llm", "chatbot"),
        *("function_call", "tool_call"),
    ),
    "tool": (
        *("tool", "function", "observation", "ipython", "tool_response", "function_response"),
        "tool_result",
    ),
}
"""Role → names of speakers. `function_call` and `tool_call` turns hold calls as JSON."""

CALLING = ("function_call", "tool_call")

_MEANING = {name: meaning for meaning, names in COLUMNS.items() for name in names}
_ROLE = {name: role for role, names in SPEAKERS.items() for name in names}
_FIELD = {name: field for field, names in reversed(FIELDS.items()) for name in names}
_TRUE, _FALSE = ("true", "yes", "on", "1", "1.0"), ("false", "no", "off", "0", "0.0")


@functools.lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """A name in lower case, with `_` between its words."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[\s\-]+", "_", name).lower()


def meaning_of(column: str) -> str | None:
    """The meaning of a column with this name: a key of `COLUMNS`, or None."""
    return _MEANING.get(plain(column)) if isinstance(column, str) else None


def role_of(speaker: Any) -> str | None:
    """The role of a speaker of this name, or None."""
    return _ROLE.get(plain(speaker)) if isinstance(speaker, str) else None


def field_of(name: Any) -> str | None:
    """The field of a message that has this name: a key of `FIELDS`, or None."""
    return _FIELD.get(plain(name)) if isinstance(name, str) else None


def flag(value: Any) -> bool | None:
    """A flag in any spelling: true, 1, 1.0, "true", "yes", "on"; None if it is not a flag."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return bool(value) if value in (0, 1) else None
    text = str(value).strip().lower() if isinstance(value, str) else ""
    return True if text in _TRUE else False if text in _FALSE else None
