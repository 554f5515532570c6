"""One field of a row at a time: text, number, truth or list, or an error that names it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from jaxalign.data.bounds import parse_json
from jaxalign.data.examples import RowError

CORRECT = "correct or remove the row"


class Cell(str):
    """A field of a table that knows text only (CSV).

    Where a column wants a number, a truth or a list, the text is read as JSON; where it wants text
    it stays as it is.
    """

    __slots__ = ()


def fail(origin: str, key: str, got: str, wanted: str, remedy: str = CORRECT) -> NoReturn:
    """Raises the error of a field that is not what it should be."""
    raise RowError(
        origin, f"{_column(key)}: wanted {wanted}", f"{key}: got {got}, wanted {wanted}; {remedy}"
    )


def fail_with(origin: str, key: str, fault: str, remedy: str = CORRECT) -> NoReturn:
    """Raises the error of a field that has a fault of another kind."""
    raise RowError(origin, f"{_column(key)}: {fault}", f"{key}: {fault}; {remedy}")


def text(value: Any, key: str, origin: str, may_be_empty: bool = False) -> str:
    """Checks a string: no lone surrogates, and something to read unless it may be empty."""
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
    """What the text of a `Cell` means as JSON; itself where it is no JSON, or no `Cell`."""
    if not isinstance(value, Cell):
        return value
    found = parsed(value)
    return str(value) if found is None else found


def parsed(value: str) -> Any:
    """The JSON in a text, or None where it is none."""
    try:
        return parse_json(value)
    except ValueError:
        return None


def keys(data: Mapping[str, Any]) -> str:
    """The columns of a row, as they appear in an error."""
    found = ", ".join(str(key)[:40] for key in list(data)[:20])
    return (found + (", …" if len(data) > 20 else "")) if data else "none"


def short(value: Any) -> str:
    """A value as it appears in an error."""
    if isinstance(value, str):
        return repr(str(value) if len(value) <= 30 else value[:30] + "…")
    if isinstance(value, list | tuple | dict):
        return f"{'an empty' if not value else 'a'} {type(value).__name__}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 10**30:
        return "a number of more than 30 digits"
    return repr(value)[:40] if value is not None else "null"


def _column(key: str) -> str:
    """A field without its place in a list, for counting."""
    return re.sub(r"\[\d+\]", "[]", key)
