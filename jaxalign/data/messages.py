"""Turns of a conversation: OpenAI's messages and ShareGPT's, with tools, checked and made alike.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. Calls of tools
are in an assistant's `tool_calls`, as OpenAI writes them, with arguments as an object. ShareGPT's
`{"from": "human", "value": str}` becomes the same; its turns `function_call` hold calls as JSON and
`observation` what the tools answered. Content may be a list of parts; parts of text are put
together, reasoning goes before them in `<think>`, anything but text is an error.
"""

from __future__ import annotations

import json
from typing import Any

from jaxalign.data.examples import ROLES, Message, Messages, RowError, Tools
from jaxalign.data.fields import Cell, fail, fail_with, items, keys, number, parsed, short, text

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""What ShareGPT calls a speaker, and what that is here."""

_OPENAI_ROLES = {role: role for role in ROLES} | {"developer": "system", "function": "tool"}
_WEIGHTS = ("weight", "loss_weight")
_NO_MEDIA = "only text is trained here: remove the rows with media, or their media"


def read_messages(value: Any, key: str, origin: str) -> Messages:
    """Checks a list of messages.

    Args:
      value: what the row holds: a list of messages in OpenAI's or ShareGPT's form. A single
        message counts as a list of one.
      key: the column, for errors.
      origin: `file:line`, for errors.

    Raises:
      ValueError: not a list of objects with a known role and text as content; a user or assistant
        turn without text; a call that is no JSON.
    """
    if isinstance(value, Cell):
        found = parsed(value)
        value = str(value) if found is None else found
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    listed = items(value, key, origin, "messages")
    return tuple(_message(message, f"{key}[{n}]", origin) for n, message in enumerate(listed))


def is_messages(value: Any) -> bool:
    """Whether a field that may be text or messages holds messages."""
    if isinstance(value, Cell):
        if not value.lstrip().startswith(("[", "{")):
            return False
        value = parsed(value)
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(first, dict) and ("role" in first or "from" in first)
    speaks = isinstance(value, dict) and ("role" in value or "from" in value)
    return speaks or isinstance(value, list | tuple)


def read_tools(value: Any, key: str, origin: str) -> Tools:
    """Checks descriptions of functions: a list, or JSON text of one (LLaMA-Factory).

    A bare function (`name`, `parameters`) is wrapped as OpenAI does: `{"type": "function",
    "function": …}`. Null, an empty text and an empty list are no tools.
    """
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            fail(origin, key, f"malformed JSON ({error})", "a list of functions")
    if value is None or value == []:
        return ()
    found = []
    for n, tool in enumerate(items(value, key, origin, "functions")):
        inner = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            fail(origin, f"{key}[{n}]", short(tool), "a function with a name")
        _check_json(tool, f"{key}[{n}]", origin)
        found.append(tool if "function" in tool else {"type": "function", "function": tool})
    return tuple(found)


def untrained(messages: Messages, origin: str) -> tuple[int, ...]:
    """Indices of the assistant turns that the row marks as context (`weight: 0`).

    Raises:
      ValueError: a weight other than 0 and 1, or one on a turn that is not the assistant's.
    """
    found = []
    for at, message in enumerate(messages):
        for name in _WEIGHTS:
            if name not in message:
                continue
            key = f"messages[{at}].{name}"
            weight = number(message[name], key, origin)
            if weight not in (0, 1):
                fail(origin, key, short(weight), "0 or 1", "leave out turns, or rows, of no use")
            if message["role"] == "assistant" and weight == 0:
                found.append(at)
            if message["role"] != "assistant" and weight == 1:
                fail_with(
                    origin,
                    key,
                    f"a {message['role']} turn is marked to be trained",
                    "set it to 0, or train everything with train_on: everything",
                )
    return tuple(found)


def _message(message: Any, at: str, origin: str) -> Message:
    """One checked message, in OpenAI's form."""
    if not isinstance(message, dict):
        fail(origin, at, short(message), "an object with role and content")
    # Tables have every column in every row: what is null is not there.
    message = {key: value for key, value in message.items() if value is not None}
    share = "from" in message and "role" not in message
    who, what = ("from", "value") if share else ("role", "content")
    if who not in message:
        fail_with(origin, f"{at}.{who}", f"missing (found: {keys(message)})", "add it")
    names = SHAREGPT_ROLES if share else _OPENAI_ROLES
    speaker = message[who]
    if not isinstance(speaker, str) or speaker not in names:
        fail(origin, f"{at}.{who}", short(speaker), f"one of {', '.join(names)}")
    role = names[speaker]
    rest = {key: value for key, value in message.items() if key not in (who, what)}
    calls: list[Any] = []
    if share and speaker == "function_call":
        value = text(message.get(what), f"{at}.{what}", origin)
        # Some write what the model thought before it called.
        thought, closing, json_text = value.rpartition("</think>")
        content = (thought + closing).strip()
        calls = _calls(json_text.strip(), f"{at}.{what}", origin)
    else:
        content, calls = _content(message.get(what), f"{at}.{what}", origin, role, rest)
    if "tool_calls" in rest:
        given = rest.pop("tool_calls")
        calls += _calls(given, f"{at}.tool_calls", origin) if given not in ([], "") else []
    if calls and role != "assistant":
        fail_with(origin, f"{at}.tool_calls", f"a {role} turn calls tools")
    for key, value in rest.items():
        _check_json(value, f"{at}.{key}", origin)
    if "reasoning_content" in rest:
        text(rest["reasoning_content"], f"{at}.reasoning_content", origin, may_be_empty=True)
    made: Message = {"role": role, "content": content} | rest
    if calls:
        made["tool_calls"] = calls
    return made


def _content(
    value: Any, key: str, origin: str, role: str, rest: dict[str, Any]
) -> tuple[str, list[Any]]:
    """What a turn says as one text, and the calls among its parts."""
    may_be_empty = role in ("system", "tool")
    if value is None:
        if not rest.get("tool_calls"):
            fail_with(origin, key, "missing, or null", "add the text or remove the row")
        return "", []
    if not isinstance(value, list):
        return text(value, key, origin, may_be_empty or bool(rest.get("tool_calls"))), []
    said, thought, calls = [], [], []
    for n, part in enumerate(items(value, key, origin, "parts")):
        at = f"{key}[{n}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            fail(origin, at, short(part), "an object with a type")
        kind = part["type"]
        inner = "text" if part.get("text") is not None else "value"
        if kind == "text":
            said.append(text(part.get(inner), f"{at}.{inner}", origin, may_be_empty=True))
        elif kind == "reasoning" and role == "assistant":
            thought.append(text(part.get(inner), f"{at}.{inner}", origin, may_be_empty=True))
        elif kind == "tool_call" and role == "assistant":
            calls += _calls(part.get(inner), f"{at}.{inner}", origin)
        else:
            fail(origin, f"{at}.type", short(kind), "text", _NO_MEDIA)
    content = "".join(said)
    text(content, key, origin, may_be_empty or bool(calls) or bool(rest.get("tool_calls")))
    if "".join(thought).strip():
        content = f"<think>\n{''.join(thought).strip()}\n</think>\n\n{content}"
    return content, calls


def _calls(value: Any, key: str, origin: str) -> list[dict[str, Any]]:
    """Calls of functions, from objects or JSON text, one or several, as OpenAI writes them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            fail(origin, key, f"malformed JSON ({error})", "calls as name and arguments")
    found = []
    for n, call in enumerate(value if isinstance(value, list) else [value]):
        at = f"{key}[{n}]"
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            fail(origin, at, short(call), "a call with name and arguments")
        arguments = inner.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parsed(arguments) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            fail(origin, f"{at}.arguments", short(inner["arguments"]), "an object, or its JSON")
        _check_json(arguments, f"{at}.arguments", origin)
        # Arguments as an object: templates that write them by `tojson` would quote a text twice.
        made = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
        found.append(({"id": call["id"]} if call.get("id") is not None else {}) | made)
    if not found:
        fail(origin, key, "no call", "calls as name and arguments")
    return found


def _check_json(value: Any, key: str, origin: str) -> None:
    """Refuses what a template could not write: dates and bytes of tables, half characters."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError, UnicodeEncodeError) as error:
        message = f"{key}: holds what is no JSON ({str(error)[:60]}); remove it or write it as text"
        raise RowError(origin, f"{key.split('[')[0]}: no JSON", message) from None
