"""Turns of a conversation, in any common spelling, checked and converted to one form.

A message is `{"role": "system" | "user" | "assistant" | "tool", "content": str}`. Calls of tools
are in an assistant's `tool_calls`, as OpenAI writes them, with arguments as an object; reasoning in
a separate field is in `reasoning_content`. ShareGPT's `{"from": "human", "value": str}` is
converted; its `function_call` turns hold calls as JSON, and its `observation` turns hold the tools'
answers. Content may be a list of parts: text parts are joined, reasoning goes before them in
`<think>`, and any other kind of part is an error. `jaxalign.data.names` lists the accepted names of
fields and speakers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxalign.data.bounds import parse_json
from jaxalign.data.examples import Message, Messages, RowError, Tools
from jaxalign.data.fields import Cell, fail, fail_with, items, keys, number, parsed, short, text
from jaxalign.data.names import CALLING, FIELDS, SPEAKERS, field_of, flag, plain, role_of

_NO_MEDIA = "only text is trained here: remove the rows with media, or their media"
_TEXT_PARTS = ("text", "input_text", "output_text")
_THINKING_PARTS = ("reasoning", "thinking", "thought", "reasoning_text")
_CALL_PARTS = ("tool_call", "tool_use", "function_call")
_PART_WEIGHTS = ("train_detail", "training_detail", "token_weights")


def read_messages(value: Any, key: str, origin: str) -> Messages:
    """Checks a list of messages.

    Args:
      value: the row's value: a list of messages in OpenAI's or ShareGPT's form. A single message
        counts as a list of one.
      key: the column, for errors.
      origin: `file:line`, for errors.

    Raises:
      ValueError: not a list of objects with a known role and text as content; a user or assistant
        turn without text; a call that is not JSON.
    """
    if isinstance(value, Cell):
        found = parsed(value)
        value = str(value) if found is None else found
    if _speaks(value):
        value = [value]
    listed = items(value, key, origin, "messages")
    return tuple(_message(message, f"{key}[{n}]", origin) for n, message in enumerate(listed))


def is_messages(value: Any) -> bool:
    """Whether a field holds messages rather than text."""
    if isinstance(value, Cell):
        if not value.lstrip().startswith(("[", "{")):
            return False
        value = parsed(value)
        first = value[0] if isinstance(value, list) and value else value
        return _speaks(first)
    return _speaks(value) or isinstance(value, list | tuple)


def _speaks(value: Any) -> bool:
    """Whether a value is a single message: an object with a role."""
    return isinstance(value, dict) and any(field_of(name) == "role" for name in value)


def read_tools(value: Any, key: str, origin: str) -> Tools:
    """Checks descriptions of functions: a list, or a list as JSON text (LLaMA-Factory).

    A bare function (`name`, `parameters`) is wrapped as OpenAI does: `{"type": "function",
    "function": …}`. Null, an empty text and an empty list mean no tools.
    """
    if isinstance(value, str):
        if not value.strip():
            return ()
        try:
            value = parse_json(value)
        except ValueError as error:
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
      ValueError: a weight other than 0 and 1, or a weight on a turn that is not the assistant's.
    """
    context = []
    for at, message in enumerate(messages):
        if "weight" not in message:
            continue
        key = f"messages[{at}].weight"
        weight = number(message["weight"], key, origin)
        if weight not in (0, 1):
            fail(origin, key, short(weight), "0 or 1", "leave out turns, or rows, of no use")
        if message["role"] == "assistant" and weight == 0:
            context.append(at)
        if message["role"] != "assistant" and weight == 1:
            fail_with(
                origin,
                key,
                f"a {message['role']} turn is marked to be trained",
                "set it to 0, or train everything with train_on: everything",
            )
    return tuple(context)


def same_turn(a: Message, b: Message) -> bool:
    """Whether two messages have the same role, content, calls and reasoning; ids may differ."""

    def calls(message: Message) -> list[Any]:
        return [call["function"] for call in message.get("tool_calls", ())]

    return calls(a) == calls(b) and all(
        a.get(name) == b.get(name) for name in ("role", "content", "reasoning_content")
    )


def _message(message: Any, at: str, origin: str) -> Message:
    """One checked message, in OpenAI's form."""
    if not isinstance(message, dict):
        fail(origin, at, short(message), "an object with role and content")
    # Tables have every column in every row: null means absent.
    message = {key: value for key, value in message.items() if value is not None}
    names = _names(message)
    speaker_key = names.get("role", "role")
    if speaker_key not in message:
        fail_with(origin, f"{at}.{speaker_key}", f"missing (found: {keys(message)})", "add it")
    speaker = message[speaker_key]
    role = role_of(speaker)
    if role is None:
        known = ", ".join(name for speakers in SPEAKERS.values() for name in speakers)
        fail(
            origin,
            f"{at}.{speaker_key}",
            short(speaker),
            f"one of {known}",
            "correct it, or say whose turn it is by `columns: {role.assistant: NAME}`",
        )
    content_key = names.get("content", "content" if speaker_key == "role" else "value")
    given = message.get(content_key)
    # Ignore fields that no template reads, such as times.
    rest = {
        key: value
        for key, value in message.items()
        if key not in (speaker_key, content_key)
        and field_of(key) in (None, "role", "content")
        and _is_json(value)
    }
    calls = _calls_of(message, names, at, origin)
    if plain(speaker) in CALLING and isinstance(given, str | list | dict) and given:
        content, more = _content_of_calls(given, f"{at}.{content_key}", origin)
        calls = more + calls
    else:
        content, more = _content(given, f"{at}.{content_key}", origin, role, bool(calls))
        calls = more + calls
    if calls and role != "assistant":
        fail_with(origin, f"{at}.tool_calls", f"a {role} turn calls tools")
    made: Message = {"role": role, "content": content} | rest
    if "tool_call_id" in names:
        made["tool_call_id"] = message[names["tool_call_id"]]
    thinking = _thinking(message, at, origin)
    if thinking:
        made["reasoning_content"] = thinking
    weight = _weight(message, at, origin, role)
    if weight is not None:
        made["weight"] = weight
    if calls:
        made["tool_calls"] = calls
    return made


def _names(message: Mapping[str, Any]) -> dict[str, str]:
    """Field → its name in this message: the first of the names in `FIELDS`."""
    spelled = {plain(key): key for key in reversed(list(message)) if isinstance(key, str)}
    found = {}
    for field, names in FIELDS.items():
        there = [spelled[name] for name in names if name in spelled]
        if there:
            found[field] = there[0]
    return found


def _thinking(message: Mapping[str, Any], at: str, origin: str) -> str:
    """The reasoning in a separate field, under any of its names."""
    texts = {}
    for key, value in message.items():
        if field_of(key) == "reasoning_content":
            texts[key] = text(value, f"{at}.{key}", origin, may_be_empty=True)
    different = dict.fromkeys(value for value in texts.values() if value.strip())
    if len(different) > 1:
        fail_with(origin, f"{at}.{next(iter(texts))}", f"differs from {', '.join(list(texts)[1:])}")
    return next(iter(different), "")


def _weight(message: Mapping[str, Any], at: str, origin: str, role: str) -> float | int | None:
    """1 or 0: whether the message is flagged as trained or as not trained."""
    weight: Any = None
    for key, value in message.items():
        if isinstance(key, str) and plain(key) in _PART_WEIGHTS and value not in ([], ""):
            fail_with(
                origin,
                f"{at}.{key}",
                "weights within a message are not supported",
                "split the message, or remove the field",
            )
        field = field_of(key)
        if field not in ("weight", "no_weight"):
            continue
        trained = flag(value)
        if trained is None and plain(key) in ("weight", "loss_weight"):
            return value  # rejected later, where it is known what is trained
        if trained is None:
            fail(origin, f"{at}.{key}", short(value), "true, false, 1 or 0")
        trained = trained if field == "weight" else not trained
        if trained and role != "assistant" and field == "no_weight":
            continue
        weight = int(trained) if weight is None else min(weight, int(trained))
    return weight


def _calls_of(
    message: Mapping[str, Any], names: Mapping[str, str], at: str, origin: str
) -> list[Any]:
    """Calls in separate fields: `tool_calls`, and `function_call` of OpenAI's older form."""
    calls: list[Any] = []
    for field in ("tool_calls", "function_call"):
        given = message.get(names.get(field, field))
        if given not in (None, [], "", {}, "none", "auto"):
            calls += _calls(given, f"{at}.{names[field]}", origin)
    return calls


def _content_of_calls(value: Any, key: str, origin: str) -> tuple[str, list[Any]]:
    """A turn whose content is a call as JSON; some data sets put reasoning before it."""
    if not isinstance(value, str):
        return "", _calls(value, key, origin)
    thought, closing, json_text = text(value, key, origin).rpartition("</think>")
    return (thought + closing).strip(), _calls(json_text.strip(), key, origin)


def _content(
    value: Any, key: str, origin: str, role: str, calls_apart: bool
) -> tuple[str, list[Any]]:
    """A turn's content as one text, and the calls among its parts."""
    may_be_empty = calls_apart or role in ("system", "tool")
    if value is None:
        if not calls_apart:
            fail_with(origin, key, "missing, or null", "add the text or remove the row")
        return "", []
    if isinstance(value, dict) and role == "tool":
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, list):
        return text(value, key, origin, may_be_empty), []
    answer, thinking, calls = [], [], []
    for n, part in enumerate(items(value, key, origin, "parts")):
        at = f"{key}[{n}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if isinstance(part, dict) and part.get("type") is None and "text" in part:
            part = part | {"type": "text"}
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            fail(origin, at, short(part), "an object with a type")
        kind = part["type"]
        inner = next((k for k in ("text", "value", "content", kind) if part.get(k) is not None), "")
        inner = inner if inner else "value"
        if kind in _TEXT_PARTS:
            answer.append(text(part.get(inner), f"{at}.{inner}", origin, may_be_empty=True))
        elif kind in _THINKING_PARTS and role == "assistant":
            thinking.append(text(part.get(inner), f"{at}.{inner}", origin, may_be_empty=True))
        elif kind in _CALL_PARTS and role == "assistant":
            call = part.get(inner)
            calls += _calls(part if call is None else call, f"{at}.{inner}", origin)
        else:
            fail(origin, f"{at}.type", short(kind), "text", _NO_MEDIA)
    content = "".join(answer)
    text(content, key, origin, may_be_empty or bool(calls))
    if "".join(thinking).strip():
        content = f"<think>\n{''.join(thinking).strip()}\n</think>\n\n{content}"
    return content, calls


def _calls(value: Any, key: str, origin: str) -> list[dict[str, Any]]:
    """Calls of functions, from objects or JSON text, one or several, as OpenAI writes them."""
    if isinstance(value, str):
        try:
            value = parse_json(value)
        except ValueError as error:
            fail(origin, key, f"malformed JSON ({error})", "calls as name and arguments")
    found = []
    for n, call in enumerate(value if isinstance(value, list) else [value]):
        at = f"{key}[{n}]"
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            fail(origin, at, short(call), "a call with name and arguments")
        names = ("arguments", "parameters", "input", "args")
        given = next((inner[name] for name in names if inner.get(name) is not None), {})
        arguments = given
        if isinstance(given, str):
            arguments = parsed(given) if given.strip() not in ("", "null") else {}
        if not isinstance(arguments, dict):
            fail(origin, f"{at}.arguments", short(given), "an object, or its JSON")
        _check_json(arguments, f"{at}.arguments", origin)
        # Arguments as an object: templates that write them with `tojson` would quote a text twice.
        made = {"type": "function", "function": {"name": inner["name"], "arguments": arguments}}
        found.append(({"id": call["id"]} if call.get("id") is not None else {}) | made)
    if not found:
        fail(origin, key, "no call", "calls as name and arguments")
    return found


def _is_json(value: Any) -> bool:
    """Whether a template can write a value as JSON; a table's dates and bytes it cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError, UnicodeEncodeError):
        return False
    return True


def _check_json(value: Any, key: str, origin: str) -> None:
    """Raises an error for values that a template cannot write: dates, bytes, half characters."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError, UnicodeEncodeError) as error:
        message = f"{key}: holds what is no JSON ({str(error)[:60]}); remove it or write it as text"
        raise RowError(origin, f"{key.split('[')[0]}: no JSON", message) from None
