"""Sources of rows: JSON and JSONL files (plain or gzip), folders, globs, hub data sets, dicts.

Every row remembers where it came from, so that whatever is wrong with it can be reported as
`file:line`. Files are read here on top of `json` for that reason; the hub is read by `datasets`.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

SUFFIXES = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
"""The file names that are read."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%+:-]+)?")

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A path, glob, folder or hub id (`owner/name` or `owner/name:split`), or a row itself."""

Sources = Source | Iterable[Source]


class Row(NamedTuple):
    """One row of a source.

    Attributes:
      data: its columns.
      origin: where it is: `file:line`, `file: row N` (lists, hub; N from 1).
    """

    data: dict[str, Any]
    origin: str


def read_rows(sources: Sources) -> list[Row]:
    """Reads all rows of all sources, in order.

    Args:
      sources: one source or several: a JSON file (a list of objects, or one object a line, whatever
        its suffix), the same as `.gz`, a folder of such files (searched recursively, in the order
        of their names), a glob, a hub id `owner/name` or `owner/name:split` (split: train unless
        named; columns that are null count as absent), or a row as a dict.

    Returns:
      The rows with their origins.

    Raises:
      ValueError: a missing, empty or unreadable file, invalid UTF-8, malformed JSON, a row that is
        not an object. It names the file, the line and what to do.
    """
    rows: list[Row] = []
    for source in _as_list(sources):
        if isinstance(source, Mapping):
            rows.append(Row(dict(source), f"row {len(rows) + 1}"))
        elif isinstance(source, str | os.PathLike):
            rows.extend(_read_named(os.fspath(source)))
        else:
            raise ValueError(
                f"sources: got {type(source).__name__}, wanted a path, a folder, a glob, a hub id "
                "'owner/name', a row (dict), or a list of these"
            )
    if not rows:
        raise ValueError("sources: got an empty list, wanted at least one path, hub id or row")
    return rows


def _as_list(sources: Any) -> list[Any]:
    """One source or several, as a list."""
    if isinstance(sources, str | os.PathLike | Mapping):
        return [sources]
    if isinstance(sources, Iterable):
        return list(sources)
    return [sources]


def _read_named(name: str) -> Iterator[Row]:
    """Rows of one path, folder, glob or hub id."""
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file() and f.name.endswith(SUFFIXES))
        if not files:
            raise ValueError(f"{name}: the folder holds no {', '.join(SUFFIXES)} file; name one")
    elif path.exists():
        files = [path]
    elif _HUB_ID.fullmatch(name) and not name.endswith(SUFFIXES):
        yield from _read_hub(name)
        return
    elif glob.has_magic(name):
        files = [pathlib.Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        if not files:
            raise ValueError(f"{name}: no file matches; correct the pattern (** goes into folders)")
    else:
        raise ValueError(
            f"{name}: no such file or folder; correct the path (hub data sets are 'owner/name')"
        )
    for file in files:
        yield from _read_file(file)


def _read_file(path: pathlib.Path) -> Iterator[Row]:
    """Rows of one JSON or JSONL file."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"{path}: got a file of unknown type, wanted {', '.join(SUFFIXES)}; convert it"
        )
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if path.name.endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read ({error}); check or re-create the file") from None
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that some editors write
    head = raw.lstrip()[:1]
    if not head:
        raise ValueError(f"{path}: the file is empty; write rows into it or leave it out")
    rows = _list_rows(path, raw) if head == b"[" else _line_rows(path, raw)
    yield from rows


def _line_rows(path: pathlib.Path, raw: bytes) -> Iterator[Row]:
    """One object a line; blank lines are passed over."""
    # Split at \n only: JSON strings may hold the other line separators of Unicode.
    for number, line in enumerate(raw.split(b"\n"), start=1):
        if line.strip():
            value = _parse(_decode(line, path, number), path, number)
            yield Row(_object(value, f"{path}:{number}"), f"{path}:{number}")


def _list_rows(path: pathlib.Path, raw: bytes) -> Iterator[Row]:
    """A file that is one list of objects."""
    values = _parse(_decode(raw, path, 1), path, 1)
    if not values:
        raise ValueError(f"{path}: the list is empty; write rows into it or leave the file out")
    for number, value in enumerate(values, start=1):
        origin = f"{path}: row {number}"
        yield Row(_object(value, origin), origin)


def _decode(raw: bytes, path: pathlib.Path, first_line: int) -> str:
    """UTF-8 text, or an error with the line of the first wrong byte."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise ValueError(
            f"{path}:{line}: invalid UTF-8 (byte {raw[error.start]:#04x}: {error.reason}); "
            "save the file as UTF-8"
        ) from None


def _parse(text: str, path: pathlib.Path, first_line: int) -> Any:
    """JSON, or an error with its line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(
            f"{path}:{line}: malformed JSON: {error.msg} (column {error.colno}); correct or remove "
            "it: a file holds one object a line, or one list of objects"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, deep nesting
        raise ValueError(
            f"{path}:{first_line}: unreadable JSON: {error}; correct or remove it"
        ) from None


def _object(value: Any, origin: str) -> dict[str, Any]:
    """The row itself, if it is an object with columns."""
    if not isinstance(value, dict) or not value:
        got = "an empty object" if value == {} else f"{json.dumps(value)[:40]}"
        raise ValueError(
            f"{origin}: got {got}, wanted an object with columns such as messages, prompt or "
            "instruction; correct or remove the row"
        )
    return value


def _read_hub(name: str) -> Iterator[Row]:
    """Rows of a hub data set."""
    import datasets

    repository, _, split = name.partition(":")
    try:
        table = datasets.load_dataset(repository, split=split if split else "train")
    except Exception as error:  # network, missing repository, missing split: one remedy
        raise ValueError(
            f"{name}: neither a file or folder here nor a readable hub data set "
            f"({type(error).__name__}: {error}); correct the path, or give 'owner/name:split'"
        ) from error
    for number, data in enumerate(table, start=1):
        columns = {key: value for key, value in dict(data).items() if value is not None}
        origin = f"{name}: row {number}"
        yield Row(_object(columns, origin), origin)
