"""Paths from users: expands `~`, rejects bucket addresses, protects existing files.

One function handles every path that is read or written; another checks every output path.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SHOWN = 4


def local_path(path: str | os.PathLike[str], option: str) -> pathlib.Path:
    """A path as the user wrote it, with `~` expanded.

    Args:
      path: a file or folder, which need not exist.
      option: the option that holds the path, for the message.

    Raises:
      ValueError: an address such as `gs://…`, or the home of a user that does not exist.
    """
    text = os.fspath(path)
    scheme = _SCHEME.match(text)
    if scheme is not None:
        raise ValueError(
            f"{option}={text!r}: wanted a path of this machine; {scheme[1]}:// is neither read nor "
            "written. Mount the bucket or copy the files, and give that path"
        )
    try:
        return pathlib.Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{option}={text!r}: {error}; give the whole path") from error


def check_free(
    path: str | os.PathLike[str],
    option: str,
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
    names: Sequence[str] | None = None,
    remedy: str = "give another path, or replace it with --overwrite",
) -> pathlib.Path:
    """Raises ValueError if writing would overwrite something.

    An empty file or folder counts as free.

    Args:
      path: the file or folder to be written.
      option: the option that holds the path, for the messages.
      overwrite: whether its content may be replaced.
      sources: models and data that are read to make it; not even `overwrite` replaces them. Sources
        that are not local paths, such as hub ids, are ignored.
      names: the names of the folder's entries that would be replaced; others may exist. None: all
        entries.
      remedy: what to do, for the message.

    Returns:
      The path, with `~` expanded.

    Raises:
      ValueError: the path is not empty, or a source would be replaced.
    """
    target = local_path(path, option)
    written = [target] if names is None else [target / name for name in names]
    for source in sources:
        if any(_holds(place, source) for place in written):
            raise ValueError(
                f"{option}={os.fspath(path)!r}: {os.fspath(source)!r} is read from there, and "
                "would be replaced; give another path"
            )
    found = [place for place in written if not is_empty(place)]
    if not found or overwrite:
        return target
    if names is None and target.is_dir():
        found = sorted(target.iterdir())
    shown = ", ".join(place.name for place in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    what = "exists" if found == [target] else f"holds {shown}{more}"
    raise ValueError(f"{option}={os.fspath(path)!r} {what}; {remedy}")


def replace_text(path: pathlib.Path, text: str) -> None:
    """Writes a file atomically: if the process is killed, the old file stays.

    Raises:
      OSError: with the file's name, which the error of a failed write lacks.
    """
    fresh = path.with_name(f".{path.name}.tmp")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def is_empty(path: pathlib.Path) -> bool:
    """Whether the path does not exist or is empty."""
    if path.is_dir():
        return next(path.iterdir(), None) is None
    return not path.exists() or (path.is_file() and not path.stat().st_size)


def _holds(place: pathlib.Path, source: str | os.PathLike[str]) -> bool:
    """Whether a source is at or below a path."""
    if _SCHEME.match(os.fspath(source)):
        return False
    with contextlib.suppress(OSError, RuntimeError):  # a loop of links, an unknown home
        inner = pathlib.Path(source).expanduser()
        if inner.exists():
            inner, outer = inner.resolve(), place.resolve()
            return inner == outer or outer in inner.parents
    return False
