"""Reads one field of a row as text, number, boolean or list, or raises an error that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxalign.data.bounds import parse_json
from jaxalign.data.examples import RowError

CORRECT = "correct or remove the row"


class Cell(str):
    """A field of a table that holds only text (CSV).

    If a number, a boolean or a list is expected, the text is parsed as JSON; otherwise it is used
    as it is.
    """

    __slots__ = ()


def fail(origin: str, key: str, got: str, wanted: str, remedy: str = CORRECT) -> NoReturn:
    """Raises the error for a field of the wrong type or value."""
    raise RowError(
        origin, f"{_column(key)}: wanted {wanted}", f"{key}: got {got}, wanted {wanted}; {remedy}"
    )


def fail_with(origin: str, key: str, fault: str, remedy: str = CORRECT) -> NoReturn:
    """Raises the error for a field with another kind of fault."""
    raise RowError(origin, f"{_column(key)}: {fault}", f"{key}: {fault}; {remedy}")


def text(value: Any, key: str, origin: str, may_be_empty: bool = False) -> str:
    """Checks a string: no lone surrogates, and not blank unless it may be empty."""
    if not isinstance(value, str):
        fail(origin, key, short(value), "text")
    if not may_be_empty and not value.strip():
        raise RowError(
            origin,
            f"{_column(key)}: empty text",
            f"{key}: got empty text; write it, or remove the row",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        fail_with(origin, key, "holds half of a surrogate pair (as \\ud83d alone), no character")
    return str(value)


def number(value: Any, key: str, origin: str) -> float:
    """Checks a finite number."""
    value = untyped(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(origin, key, short(value), "a finite number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        fail(origin, key, short(value), "a finite number")
    return found


def truth(value: Any, key: str, origin: str) -> bool:
    """Checks true or false; 1 and 0 are accepted."""
    if isinstance(value, Cell) and value.strip().lower() in ("true", "false"):
        return value.strip().lower() == "true"
    value = untyped(value)
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    fail(origin, key, short(value), "true or false")


def items(value: Any, key: str, origin: str, of: str) -> list[Any]:
    """Checks a list that is not empty."""
    value = untyped(value)
    if not isinstance(value, list | tuple) or not value:
        fail(origin, key, short(value), f"a list of {of}")
    return list(value)


def untyped(value: Any) -> Any:
    """A `Cell`'s text parsed as JSON; any other value, or text that is not JSON, is unchanged."""
    if not isinstance(value, Cell):
        return value
    found = parsed(value)
    return str(value) if found is None else found


def parsed(value: str) -> Any:
    """The value of a JSON text, or None if the text is not JSON."""
    try:
        return parse_json(value)
    except ValueError:
        return None


def keys(data: Mapping[str, Any]) -> str:
    """The columns of a row, for an error message."""
    found = ", ".join(str(key)[:40] for key in list(data)[:20])
    return (found + (", …" if len(data) > 20 else "")) if data else "none"


def short(value: Any) -> str:
    """A value, for an error message."""
    if isinstance(value, str):
        return repr(str(value) if len(value) <= 30 else value[:30] + "…")
    if isinstance(value, list | tuple | dict):
        return f"{'an empty' if not value else 'a'} {type(value).__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return repr(value)[:40] if value is not None else "null"


def _column(key: str) -> str:
    """A field's name without list indices, for counting."""
    return re.sub(r"\[\d+\]", "[]", key)
