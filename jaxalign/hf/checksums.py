"""Checksums of a folder's files, to detect flipped bits and truncated files when reading."""

from __future__ import annotations

import concurrent.futures
import json
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import xxhash

from jaxalign.data.bounds import parse_json

NAME = "checksums.json"
OTHER_BYTES = "has other bytes than were written"
_ALGORITHM = "xxh3_128"  # detects damage, not forgery; as fast as memory
_BLOCK = 1 << 20  # bytes read at a time; they fit in the processor's cache
_THREADS = 8


class Damage(NamedTuple):
    """A file that differs from what was written.

    Attributes:
      file: its path in the folder, with "/" between its parts.
      what: what is wrong with it, such as "is cut: 100 of 2,000 bytes".
    """

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


def write(folder: pathlib.Path, ignore: Iterable[str] = ()) -> None:
    """Records size and checksum of all files in `folder` in its `checksums.json`, written last.

    Args:
      folder: a folder whose files are complete. The caller renames it afterwards, so that a folder
        with the final name is complete.
      ignore: names of files to leave out, in any sub-folder.
    """
    unlisted = {NAME, *ignore}
    names = [name for name in _names(folder) if name.rpartition("/")[2] not in unlisted]
    entries = dict(zip(names, _map(lambda name: _entry(folder / name), names), strict=True))
    text = json.dumps({"algorithm": _ALGORITHM, "files": entries}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def check(folder: pathlib.Path, share: tuple[int, int] = (0, 1)) -> list[Damage] | None:
    """Reads the listed files and compares them with their checksums.

    Args:
      folder: with or without a `checksums.json`.
      share: (i, n): read the i-th of n shares of the work.

    Returns:
      The damage, in the order of names; None (unknown) if `folder` has no `checksums.json`. Files
      that are not listed do not count as damage, because users add files.
    """
    try:
        text = (folder / NAME).read_text("utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        return [Damage(NAME, f"cannot be read ({error})")]
    try:
        record = parse_json(text)
        entries = {str(k): (int(v["bytes"]), str(v["sum"])) for k, v in record["files"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return [Damage(NAME, "is damaged: it is no list of checksums")]
    if record.get("algorithm") != _ALGORITHM:
        return [Damage(NAME, f"has algorithm={record.get('algorithm')!r}, wanted {_ALGORITHM!r}")]
    names = sorted(entries)[share[0] :: share[1]]
    found = _map(lambda name: _damage(folder / name, *entries[name]), names)
    pairs = zip(names, found, strict=True)
    return [Damage(name, what) for name, what in pairs if what is not None]


def _damage(path: pathlib.Path, size: int, wanted: str) -> str | None:
    try:
        there = path.stat().st_size
        if there != size:
            word = "is cut" if there < size else "has grown"
            return f"{word}: {there:,} of {size:,} bytes"
        if checksum(path) != wanted:
            return OTHER_BYTES
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def _names(folder: pathlib.Path) -> list[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def _entry(path: pathlib.Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sum": checksum(path)}


def checksum(path: pathlib.Path) -> str:
    """The XXH3 checksum of a file's bytes, 128 bits in hexadecimal."""
    total = xxhash.xxh3_128()
    block = memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            total.update(block[:count])
    return total.hexdigest()


def _map(function, names: Iterable[str]) -> list:
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, names))
