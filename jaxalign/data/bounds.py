"""What comes in stays within bounds: plain files, and JSON whose depth and numbers are limited.

Files that people give may be wrong or hostile. A named pipe would block for ever, a device never
ends, and JSON that is nested too deep or holds a number of a thousand digits fails far from the
place where it was read.
"""

from __future__ import annotations

import collections
import json
import pathlib
import stat
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 100
"""Lists and objects within each other in a JSON text."""
MAX_DIGITS = 300
"""Digits of a whole number in a JSON text; beyond 308 it fits no float."""
MAX_JSON_BYTES = 256 * 2**20
"""Bytes of a JSON file that is read at once, such as `config.json`."""


def check_plain(path: pathlib.Path) -> None:
    """Refuses a path that opening could block on: a named pipe, a device, a socket.

    What does not exist passes, and so do folders: who opens them says it better.

    Raises:
      ValueError: it is one of these, also through a link.
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
    """`check_plain` of everything that lies directly in a folder.

    Raises:
      ValueError: an entry is no file and no folder.
    """
    for path in sorted(folder.iterdir()):
        check_plain(path)


def read_json_file(path: pathlib.Path) -> Any:
    """Reads a JSON file whole.

    Raises:
      ValueError: not a plain file, larger than `MAX_JSON_BYTES`, or as `parse_json` has it. The
        message names the file.
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
    """`json.loads` that fails with a `ValueError` alone.

    NaN and Infinity are read as Python reads them; who wants a finite number checks that.

    Raises:
      ValueError: not UTF-8, not JSON, nested deeper than `MAX_DEPTH`, or a whole number of more
        than `MAX_DIGITS` digits.
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
    # Few texts have so many brackets that the value must be looked at.
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
    """The names that are there more than once, in order, found in linear time."""
    return [name for name, count in collections.Counter(names).items() if count > 1]


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits, wanted at most {MAX_DIGITS}")
    return int(digits)


def _too_deep() -> ValueError:
    return ValueError(f"lists and objects nested more than {MAX_DEPTH} deep")
