"""Columns whose names have a meaning: row weights, and data that must not be lost unread."""

from __future__ import annotations

from typing import Any

from jaxalign.data.examples import RowError
from jaxalign.data.fields import Cell, parsed
from jaxalign.data.files import Row
from jaxalign.data.names import flag, meaning_of

IGNORE = "ignore"
"""What `columns` maps a column to if it should be ignored without an error."""

PROMPTS = ("prompt", "instruction", "question", "conversations", "messages")
"""The columns that can hold a prompt; the first one in a row is used."""
ANSWERS = ("completion", "response", "output", "answer")


def check_weight(row: Row, trained: bool) -> None:
    """Raises `Untrained` for rows that are flagged as not to be trained."""
    data: Any = row.data
    for name in list(data):
        meaning = meaning_of(name)
        if meaning not in ("weight", "no_weight") or not data.has(name):
            continue
        value = dict.__getitem__(data, name)
        value = parsed(value) if isinstance(value, Cell) else value
        if isinstance(value, list) and trained:
            continue  # one for each message
        on = flag(value)
        if on is None:
            continue  # not read; reported, or an error, later
        data.get(name)
        if on != (meaning == "weight"):
            raise Untrained(
                row.origin,
                f"{name}: not to be trained",
                f"{name}: says that the row is not to be trained; it is left out",
            )


class Untrained(RowError):
    """A row that is flagged as not to be trained: left out and counted."""


def check_unused(row: Row, name: str, example: Any, *, trained: bool, by_columns: bool) -> None:
    """Raises an error for a column with a known meaning that was not read.

    For columns of our own forms, such as `prompt` beside `instruction`, the form decides which are
    read. A prompt or an answer under another name may be ignored if it repeats what was read.
    """
    data: Any = row.data
    value, meaning = data.source[name], meaning_of(name)
    if name in (*PROMPTS, *ANSWERS):
        return
    if meaning in ("weight", "no_weight"):
        wrong = trained
    elif meaning in ("system", "context") and isinstance(value, list | dict):
        raise RowError(
            row.origin,
            f"{name}: a column that would be lost",
            f"{name}: the column is not read, since its name means a {meaning} and it holds no "
            f"text; join it into one text, or leave it out by `columns: {{{name}: {IGNORE}}}`",
        )
    elif not isinstance(value, str) or not value.strip() or meaning is None:
        return
    elif meaning == "prompt":
        wrong = trained and by_columns and not _repeats(value, _words(example, ("user",)))
    elif meaning == "completion":
        answers = _words(example, ("assistant",))
        wrong = trained and by_columns and not any(value.strip() in text for text in answers)
    elif meaning == "thinking":
        wrong = trained and not any(value.strip() in text for text in _words(example, None))
    else:
        wrong = meaning in ("system", "context") and not any(
            value.strip() in text for text in _words(example, None)
        )
    if wrong:
        ours = "weight" if meaning == "no_weight" else meaning
        read = ", ".join(sorted(set(data.reading.columns.values())))
        raise RowError(
            row.origin,
            f"{name}: a column that would be lost",
            f"{name}: the column is not read (read: {read}), and its name means a {ours}; say what "
            f"it is by `columns: {{{ours}: {name}}}`, or leave it out by `columns: {{{name}: "
            f"{IGNORE}}}`",
        )


def _words(example: Any, roles: tuple[str, ...] | None) -> list[str]:
    """The texts of an example's messages with certain roles."""
    if not hasattr(example, "_asdict"):
        return []
    texts: list[str] = []
    todo: list[Any] = [getattr(example, "text", ()) or ()]
    for field in ("messages", "prompt", "chosen", "rejected", "answer", "answers", "steps"):
        todo.append(getattr(example, field, ()))
    while todo:
        part = todo.pop()
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            if roles is None or part.get("role") in roles:
                texts += [part.get("content", ""), part.get("reasoning_content", "")]
        else:
            todo += part
    return texts


def _repeats(value: str, texts: list[str]) -> bool:
    """Whether a text contains, or is contained in, one of others."""
    return any(value.strip() in text or (text.strip() and text.strip() in value) for text in texts)
