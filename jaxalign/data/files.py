"""Files of rows, read row by row: JSON, JSONL, CSV (plain or gzip), Parquet, text.

A reader yields a `Row` for each row. It yields a `RowError` for a row that cannot be read if the
rows after it still can; faults of a whole file are raised. JSON and CSV are read here with `json`
and `csv`, because no table library reports the line of a row.
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
import pathlib
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

from jaxalign.data.bounds import check_depth, check_plain, repeated
from jaxalign.data.examples import RowError
from jaxalign.data.fields import Cell

_JSON = (".json", ".jsonl", ".ndjson", ".json.gz", ".jsonl.gz", ".ndjson.gz")
_CSV = (".csv", ".csv.gz")
_PARQUET = (".parquet",)
_TEXT = (".txt", ".txt.gz")
ROW_SUFFIXES = (*_JSON, *_CSV, *_PARQUET)
"""The suffixes of the files that are read in folders."""
SUFFIXES = (*ROW_SUFFIXES, *_TEXT)
"""The suffixes of the files that can be read."""

_MARK = b"\xef\xbb\xbf"  # the byte-order mark, which some editors write
_END_OF_TEXT = "<|endoftext|>"

MAX_UNPACKED = 2**30
"""The maximum size in bytes of a line, list or document unpacked from gzip."""


class Row(NamedTuple):
    """One row of a source.

    Attributes:
      data: its columns.
      origin: its location: `file:line` (in a JSON list `file:line (row N)`), or `file: row N` in
        Parquet and on the hub. Lines and rows count from 1.
    """

    data: dict[str, Any]
    origin: str


def read_file(path: pathlib.Path, *, may_be_empty: bool = False) -> Iterator[Row | RowError]:
    """Reads the rows of one file, by its suffix.

    Args:
      path: the file's path.
      may_be_empty: the file is one of several, such as the shards of a data set.

    Raises:
      ValueError: an unknown suffix, not a plain file, an empty file, or a file that cannot be read
        (to its end).
    """
    check_plain(path)
    readers = ((_JSON, _json), (_CSV, _csv), (_PARQUET, _parquet), (_TEXT, _text))
    read = next((read for suffixes, read in readers if path.name.endswith(suffixes)), None)
    if read is None:
        raise ValueError(
            f"{path}: got a file of unknown type, wanted {', '.join(SUFFIXES)}; convert it"
        )
    empty = True
    for row in read(path):
        empty = False
        yield row
    if empty and not may_be_empty:
        listed = path.name.endswith(_JSON) and any(line.strip() for _, line in _lines(path))
        what = "list" if listed else "file"
        raise ValueError(f"{path}: the {what} is empty; write rows into it or leave the file out")


def checked(value: Any, origin: str) -> Row | RowError:
    """The row, if it is an object with columns."""
    if isinstance(value, dict) and value:
        return Row(value, origin)
    got = "an empty object" if value == {} else f"{json.dumps(value)[:40]}"
    return RowError(
        origin,
        "no object with columns",
        f"got {got}, wanted an object with columns such as messages, prompt or instruction; "
        "correct or remove the row",
    )


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a plain or gzip file, without the byte-order mark."""
    number = 0
    try:
        packed = path.name.endswith(".gz")
        opened: Any = gzip.open if packed else open
        with opened(path, "rb") as file:
            # A few MiB of gzip can unpack to a line of many GiB.
            read = functools.partial(file.readline, MAX_UNPACKED + 1 if packed else -1)
            # In bytes only \n ends a line: JSON strings may hold Unicode's other separators.
            for number, line in enumerate(iter(read, b""), start=1):
                if packed:
                    _check_unpacked(path, number, len(line))
                yield number, line.removeprefix(_MARK) if number == 1 else line
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be read after line {number} ({error}); check or re-create the file"
        ) from None


def _check_unpacked(path: pathlib.Path, line: int, size: int) -> None:
    if path.name.endswith(".gz") and size > MAX_UNPACKED:
        raise ValueError(
            f"{path}:{line}: unpacks to more than {MAX_UNPACKED:,} bytes in one piece; unpack the "
            "file, or write one object a line"
        )


# JSON


def _json(path: pathlib.Path) -> Iterator[Row | RowError]:
    """A list of objects, or one object per line; blank lines are skipped."""
    lines = _lines(path)
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        starts, first = first, False
        if starts and line.lstrip().startswith(b"["):
            yield from _list_rows(path, _joined(path, number, line, lines))
        else:
            yield _line_row(path, number, line)


def _joined(
    path: pathlib.Path, number: int, line: bytes, lines: Iterator[tuple[int, bytes]]
) -> bytes:
    """A file from line `number` on, preceded by one blank line for each earlier line."""
    parts = [b"\n" * (number - 1), line]
    size = len(line)
    for number, following in lines:
        parts.append(following)
        size += len(following)
        _check_unpacked(path, number, size)
    return b"".join(parts)


def _line_row(path: pathlib.Path, number: int, line: bytes) -> Row | RowError:
    origin = f"{path}:{number}"
    try:
        return _row(_DECODER.decode(line.decode("utf-8").rstrip("\r\n")), line, origin)
    except (ValueError, RecursionError) as error:
        return RowError(origin, *_json_fault(error))


def _row(value: Any, text: str | bytes, origin: str) -> Row | RowError:
    try:
        check_depth(value, text)
    except ValueError as error:
        return RowError(origin, *_json_fault(error))
    return checked(value, origin)


def _list_rows(path: pathlib.Path, raw: bytes) -> Iterator[Row | RowError]:
    """The objects of one list, each with the line on which it begins."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _stop(path, 1 + raw.count(b"\n", 0, error.start), error)
    at = text.index("[") + 1
    line, counted, number = 1, 0, 0
    while True:
        at = _BLANK.match(text, at).end()
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]" and number == 0:
            break
        number += 1
        origin = f"{path}:{line} (row {number})"
        start = at
        try:
            value, at = _DECODER.raw_decode(text, start)
        except _Twice as error:
            # Only a decoder that accepts duplicate keys can tell where the object ends.
            try:
                _, at = _PLAIN.raw_decode(text, at)
            except (ValueError, RecursionError) as worse:
                _stop(path, line, worse)
            yield RowError(origin, *_json_fault(error))
        except (ValueError, RecursionError) as error:
            _stop(path, line, error)
        else:
            yield _row(value, text[start:at], origin)
        at = _BLANK.match(text, at).end()
        if text[at : at + 1] != ",":
            break
        at += 1
    if text[at : at + 1] != "]" or text[at + 1 :].strip(" \t\r\n"):
        where = at if text[at : at + 1] != "]" else at + 1
        _stop(path, line, json.JSONDecodeError("expected ',' or the end of the list", text, where))


class _Twice(ValueError):
    """A key occurs twice in an object."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; raises if a key occurs twice, since one value would be lost."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice = repeated(key for key, _ in pairs)[0]
        raise _Twice(f"the key {twice[:40]!r} is given twice in an object")
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_once)
_PLAIN = json.JSONDecoder()
_BLANK: Any = re.compile(r"[ \t\r\n]*")


def _json_fault(error: Exception) -> tuple[str, str]:
    """The reason and the message for a fault in a JSON text."""
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return "invalid UTF-8", (
            f"invalid UTF-8 (byte {byte:#04x}: {error.reason}); save the file as UTF-8"
        )
    if isinstance(error, json.JSONDecodeError):
        return "malformed JSON", (
            f"malformed JSON: {error.msg} (column {error.colno}); correct or remove it: a file "
            "holds one object a line, or one list of objects"
        )
    if isinstance(error, _Twice):
        return "a key given twice", f"{error}; keep one of them"
    # Numbers of thousands of digits, deep nesting.
    return "unreadable JSON", f"unreadable JSON: {error}; correct or remove it"


def _stop(path: pathlib.Path, line: int, error: Exception) -> NoReturn:
    """Raises for a list that cannot be read beyond its fault."""
    if isinstance(error, json.JSONDecodeError):
        line = error.lineno
    raise ValueError(f"{path}:{line}: {_json_fault(error)[1]}") from None


# CSV


def _csv(path: pathlib.Path) -> Iterator[Row | RowError]:
    """A header, then one record per row (RFC 4180: commas; quoted cells may hold lines)."""
    # The library limits cells to 128 KiB because of stray quotes, but strict mode finds those.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    reader = csv.reader(_decoded(path), strict=True)
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            origin = f"{path}:{first}"
            first = reader.line_num + 1
            if not cells:
                continue
            if header:
                yield _csv_row(header, cells, origin)
                continue
            header = cells
            if len(set(header)) < len(header):
                raise ValueError(f"{origin}: two columns have the same name; rename one")
    except csv.Error as error:
        raise ValueError(
            f"{path}:{reader.line_num}: malformed CSV: {error} (in the row that begins at line "
            f"{first}); correct the quotes, or write JSONL"
        ) from None


def _csv_row(header: list[str], cells: list[str], origin: str) -> Row | RowError:
    if len(cells) != len(header):
        return RowError(
            origin,
            "another number of cells than the header",
            f"got {len(cells)} cells, wanted {len(header)} as in the header; correct the row: put "
            "text with commas in quotes",
        )
    pairs = zip(header, cells, strict=True)
    return checked({name: Cell(cell) for name, cell in pairs if cell != ""}, origin)


def _decoded(path: pathlib.Path) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            # After an error inside a record, the start of the next record is unknown.
            _stop(path, number, error)


# Parquet


class _ColumnTwice(Exception):
    """A table has two columns with the same name."""


def _parquet(path: pathlib.Path) -> Iterator[Row | RowError]:
    """A row group at a time, in parts."""
    import pyarrow.parquet

    number = 0
    try:
        # A file with false lengths must not make us allocate that much memory.
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            twice = repeated(file.schema_arrow.names)
            if twice:
                raise _ColumnTwice(min(twice))
            for batch in file.iter_batches(batch_size=1024):
                for data in _batch_rows(batch):
                    number += 1
                    yield checked(data, f"{path}: row {number}")
    except _ColumnTwice as error:
        raise ValueError(
            f"{path}: two columns are called {error.args[0]!r}, of which one would be lost; rename "
            "one"
        ) from None
    except Exception as error:  # pyarrow raises what its readers find: Arrow, OS, Unicode errors
        raise ValueError(
            f"{path}: cannot be read after row {number} ({_first_line(error)}); check or re-create "
            "the file"
        ) from None


def _batch_rows(batch: Any) -> Iterable[dict[str, Any]]:
    for data in batch.to_pylist():
        yield {key: value for key, value in data.items() if value is not None}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


# Text


def _text(path: pathlib.Path) -> Iterator[Row | RowError]:
    """Documents separated by lines of `<|endoftext|>`; without them the file is one document."""
    first, held, size = 1, [], 0
    for number, line in enumerate(_decoded(path), start=1):
        if line.strip() != _END_OF_TEXT:
            held.append(line)
            size += len(line)
            _check_unpacked(path, number, size)
            continue
        if "".join(held).strip():
            yield Row({"text": "".join(held).strip("\n")}, f"{path}:{first}")
        first, held, size = number + 1, [], 0
    if "".join(held).strip():
        yield Row({"text": "".join(held).strip("\n")}, f"{path}:{first}")
