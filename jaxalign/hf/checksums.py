"""Checksums of a folder's files, so that a flipped bit or a cut file is found when it is read."""

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
_ALGORITHM = "xxh3_128"  # against damage, not against forgery; as fast as memory
_BLOCK = 1 << 20  # bytes read at a time: they stay in the processor's cache
_THREADS = 8


class Damage(NamedTuple):
    """One file that is not as it was written.

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
      folder: with files that nobody writes to any more. It gets its name afterwards, so that what
        has the name is whole.
      ignore: names of files that are left out, in whatever sub-folder.
    """
    unlisted = {NAME, *ignore}
    names = [name for name in _names(folder) if name.rpartition("/")[2] not in unlisted]
    entries = dict(zip(names, _map(lambda name: _entry(folder / name), names), strict=True))
    text = json.dumps({"algorithm": _ALGORITHM, "files": entries}, indent=1)
    (folder / NAME).write_text(text + "\n", encoding="utf-8")


def check(folder: pathlib.Path, share: tuple[int, int] = (0, 1)) -> list[Damage] | None:
    """Reads the listed files and compares.

    Args:
      folder: with or without a `checksums.json`.
      share: (i, n): of n readers that share the work, what the i-th reads.

    Returns:
      What is wrong, in the order of names; None where `folder` has no `checksums.json`, so that
      nothing can be said. Files that are not listed are no damage: people add files.
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
