"""Limits on input: only plain files, and JSON with limited depth and number length.

Files from users may be wrong or hostile. Reading a named pipe would block forever, and a device
never ends. JSON that is nested too deeply or holds a number of a thousand digits fails far from
where it was read.
"""

from __future__ import annotations

import collections
import json
import pathlib
import stat
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 100
"""The maximum nesting depth of a JSON text."""
MAX_DIGITS = 300
"""The maximum number of digits of an integer in a JSON text; above 308 it fits no float."""
MAX_JSON_BYTES = 256 * 2**20
"""The maximum size in bytes of a JSON file that is read whole, such as `config.json`."""


def check_plain(path: pathlib.Path) -> None:
    """Raises ValueError for a path that could block when opened: a named pipe, a device, a socket.

    A missing path passes, and so does a folder: the code that opens them has a better error.

    Raises:
      ValueError: it is one of these, directly or through a link.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # ValueError: a NUL in the name
        return
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return
    names = ((stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    what = next((name for test, name in names if test(mode)), "a device")
    raise ValueError(f"{path} is {what}, wanted a file; write its content to a file and give that")


def check_plain_folder(folder: pathlib.Path) -> None:
    """`check_plain` for each direct entry of a folder.

    Raises:
      ValueError: an entry is neither a file nor a folder.
    """
    for path in sorted(folder.iterdir()):
        check_plain(path)


def read_json_file(path: pathlib.Path) -> Any:
    """Reads a JSON file whole.

    Raises:
      ValueError: not a plain file, larger than `MAX_JSON_BYTES`, or as `parse_json`. The message
        names the file.
      OSError: it cannot be opened.
    """
    check_plain(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes, wanted at most {MAX_JSON_BYTES:,}; get the file again"
        )
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """`json.loads` whose only exception is `ValueError`.

    NaN and Infinity are read as Python reads them; callers that need finite numbers must check.

    Raises:
      ValueError: not UTF-8, not JSON, nested deeper than `MAX_DEPTH`, or an integer of more than
        `MAX_DIGITS` digits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise _too_deep() from None
    check_depth(value, text)
    return value


def check_depth(value: Any, text: str | bytes) -> None:
    """Checks the depth of a value that was read from a JSON text.

    Raises:
      ValueError: it is nested deeper than `MAX_DEPTH`.
    """
    # Few texts have so many brackets that the value's depth must be measured.
    marks = (b"[", b"{") if isinstance(text, bytes) else ("[", "{")
    if sum(text.count(mark) for mark in marks) <= MAX_DEPTH:  # pyrefly: ignore[bad-argument-type]
        return
    level, depth = [value], 0
    while level := [inner for inner in level if isinstance(inner, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [x for outer in level for x in (outer.values() if type(outer) is dict else outer)]


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in order, in linear time."""
    return [name for name, count in collections.Counter(names).items() if count > 1]


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, wanted at most {MAX_DIGITS}")
    return int(digits)


def _too_deep() -> ValueError:
    return ValueError(f"lists and objects nested more than {MAX_DEPTH} deep")
