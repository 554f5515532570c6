"""Sources of rows: files, folders, globs, buckets, hub data sets, dicts.

Every row keeps its origin, so that any fault can be reported as `file:line`. `jaxalign.data.files`
reads files, row by row; the hub is read by `datasets`.
"""

from __future__ import annotations

import functools
import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.examples import RowError
from jaxalign.data.files import ROW_SUFFIXES, SUFFIXES, Row, checked, read_file
from jaxalign.data.paths import local_path
from jaxalign.data.remote import fetch, fetch_matches, is_address

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+(?=:))?(:[\w.\[\]%+:-]+)?")
# Index files of data sets (LLaMA-Factory's, the hub's) hold no rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
# The files that `save_to_disk` writes beside its tables.
_SAVED = ("dataset_dict.json", "state.json")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "test": "test",
    "testing": "test",
}
"""Words in the names of files and folders → the split that they name."""

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A path, glob, folder or hub id (`owner/name[:config][:split]`), or a row itself."""

Sources = Source | Iterable[Source]

OnFault = Callable[[RowError], None] | None
"""Called for a bad row, instead of raising its error."""


def read_rows(sources: Sources, on_fault: OnFault = None) -> list[Row]:
    """Reads all rows of all sources, in order, into memory.

    Args:
      sources: one source or several: a file (`SUFFIXES`; JSON is a list of objects, or one object
        per line, with any suffix), a folder of such files (searched recursively, in the order of
        their names; `.txt`, `dataset_info.json` and names that begin with `.` or `__` are skipped;
        if names show splits, train is read unless `folder:split` names one), a folder that
        `save_to_disk` of `datasets` wrote, a glob, a hub id `owner/name`, `owner/name:split` or
        `owner/name:config:split` (split: train unless named, slices as `train[:1000]`), or a row as
        a dict. Columns of tables and hub data sets that are null, or empty cells of CSV, count as
        absent.
      on_fault: called with the error if a row cannot be read; the row is then skipped. None: raise
        the error. A fault that makes a whole file unreadable always raises.

    Returns:
      The rows with their origins.

    Raises:
      ValueError: a missing, empty or unreadable file, invalid UTF-8, malformed JSON, a row that is
        not an object. The message names the file, the line and the remedy.
    """
    return list(_rows(sources, on_fault, streaming=False))


def iter_rows(sources: Sources, on_fault: OnFault = None) -> Iterator[Row]:
    """The rows of `read_rows`, one at a time, for data that does not fit in memory.

    Files are read line by line (JSONL, CSV, also as gzip) or row group by row group (Parquet); the
    hub by `datasets` in streaming mode (slices of a split are downloaded and mapped instead). A
    JSON file with one list is held in memory as text while its rows are read.

    Arguments and errors as `read_rows`; an error is raised when its row is reached.
    """
    return _rows(sources, on_fault, streaming=True)


def fetch_rows(source: str) -> None:
    """Downloads a hub data set into the cache of `datasets`, by reading its first row.

    Raises:
      ValueError: as `read_rows`.
    """
    for row in _read_named(source, streaming=False):
        if not isinstance(row, Row):
            raise row
        return


def _rows(sources: Sources, on_fault: OnFault, streaming: bool) -> Iterator[Row]:
    found = 0
    for source in _as_list(sources):
        if isinstance(source, Mapping):
            found += 1
            yield Row(dict(source), f"row {found}")
        elif isinstance(source, str | os.PathLike):
            for row in _read_named(os.fspath(source), streaming):
                found += 1
                if isinstance(row, Row):
                    yield row
                elif on_fault is None:
                    raise row
                else:
                    on_fault(row)
        else:
            raise ValueError(
                f"sources: got {type(source).__name__}, wanted a path, a folder, a glob, a hub id "
                "'owner/name', a row (dict), or a list of these"
            )
    if not found:
        raise ValueError("sources: got an empty list, wanted at least one path, hub id or row")


def _as_list(sources: Any) -> list[Any]:
    """One source or several, as a list."""
    if isinstance(sources, str | os.PathLike | Mapping):
        return [sources]
    if isinstance(sources, Iterable):
        return list(sources)
    return [sources]


def _read_named(name: str, streaming: bool) -> Iterator[Row | RowError]:
    """Rows of one path, folder, glob or hub id."""
    path, split = split_path(name)
    if path.is_dir() and any((path / marker).is_file() for marker in _SAVED):
        yield from _read_saved(path, name, split)
        return
    if path.is_dir():
        files = _files_of(path, name, split)
    elif path.exists():
        if split is not None:
            raise ValueError(f"{name}: a file has no splits; leave out split {split!r}")
        files = [path]
    elif _HUB_ID.fullmatch(name) and not name.endswith(SUFFIXES):
        yield from _read_hub(name, streaming)
        return
    elif glob.has_magic(name):
        files = [pathlib.Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        given = set(path.parts)
        files = [f for f in files if f.is_file() and not any(_hidden(set(f.parts) - given))]
        if not files:
            raise ValueError(f"{name}: no file matches; correct the pattern (** goes into folders)")
    else:
        raise ValueError(
            f"{name}: no such file or folder; correct the path (hub data sets are 'owner/name')"
        )
    empty = []
    for file in files:
        rows = 0
        for rows, row in enumerate(read_file(file, may_be_empty=len(files) > 1), start=1):  # noqa: B007
            yield row
        empty += [] if rows else [str(file)]
    if len(empty) == len(files):
        raise ValueError(f"{name}: all {len(files)} files are empty; write rows into them")
    if empty:
        _note(f"{name}: passed over {len(empty)} empty files, such as {empty[0]}")


def split_path(name: str) -> tuple[pathlib.Path, str | None]:
    """Splits `folder:split` and expands `~`; a hub id keeps its split, bucket files are copied."""
    if is_address(name):
        return _split_address(name)
    path = local_path(name, "data")
    before, colon, split = name.rpartition(":")
    if not path.exists() and colon and before:
        inner = pathlib.Path(before).expanduser()
        if inner.exists():
            return inner, split
    return path, None


def _split_address(name: str) -> tuple[pathlib.Path, str | None]:
    """The same for a bucket address, whose files are fetched."""
    if glob.has_magic(name):
        return fetch_matches(name, "data"), None
    before, colon, split = name.rpartition(":")
    if colon and "://" in before and "/" not in split:
        return fetch(before, "data"), split
    return fetch(name, "data"), None


def _hidden(parts: Iterable[str]) -> Iterator[bool]:
    """Whether parts of a path are hidden or belong to a tool, such as `.git` and `__MACOSX`."""
    return (part.startswith((".", "__")) for part in parts)


def _files_of(folder: pathlib.Path, name: str, split: str | None) -> list[pathlib.Path]:
    """The files of a folder to read: those of one split, if their names show splits."""
    inside = sorted(
        file.relative_to(folder)
        for file in folder.rglob("*")
        if file.is_file() and file.name.endswith(ROW_SUFFIXES) and file.name not in _NO_ROWS
    )
    inside = [file for file in inside if not any(_hidden(file.parts))]
    if not inside:
        raise ValueError(f"{name}: the folder holds no {', '.join(ROW_SUFFIXES)} file; name one")
    by_split: dict[str | None, list[pathlib.Path]] = {}
    for file in inside:
        by_split.setdefault(split_of(file.as_posix()), []).append(file)
    named = [label for label in by_split if label is not None]
    wanted = _SPLIT_NAMES.get(split, split) if split is not None else None
    if wanted is None:
        if len(named) < 2 and not (named and None in by_split and named != ["train"]):
            return [folder / file for file in inside]
        wanted = "train"
        if "train" not in by_split and None not in by_split:
            raise ValueError(
                f"{name}: the folder holds the splits {', '.join(sorted(named))} and no train; "
                "name one by `split:`"
            )
    chosen = by_split.get(wanted, [])
    if wanted == "train":  # files whose names show no split belong to train
        chosen = sorted([*chosen, *by_split.get(None, [])])
    if not chosen:
        got = ", ".join(sorted(named)) if named else "files that name no split"
        raise ValueError(f"{name}: the folder holds no split {split!r}, but {got}; correct split")
    others = {label: len(files) for label, files in by_split.items() if label not in (wanted, None)}
    if others:
        left = ", ".join(f"{label} ({count})" for label, count in sorted(others.items()))  # type: ignore[misc]
        _note(f"{folder}: reads split {wanted} ({len(chosen)} files), not {left}")
    return [folder / file for file in chosen]


def split_of(path: str) -> str | None:
    """The split that a file holds, by the usual words in its path; None if there are none.

    >>> split_of("data/test-00000-of-00001.parquet"), split_of("latest.jsonl")
    ('test', None)
    """
    words = re.split(r"[-._ /0-9]+", path.lower())
    return next((_SPLIT_NAMES[word] for word in reversed(words) if word in _SPLIT_NAMES), None)


@functools.cache
def _note(line: str) -> None:
    """Prints a line, once."""
    print(line)


def _read_saved(path: pathlib.Path, name: str, split: str | None) -> Iterator[Row | RowError]:
    """Rows of a folder that `save_to_disk` of `datasets` wrote."""
    import datasets

    try:
        found: Any = datasets.load_from_disk(str(path))
    except Exception as error:  # any error of the library
        raise ValueError(
            f"{name}: `save_to_disk` wrote this folder, but `datasets` cannot read it "
            f"({type(error).__name__}: {error}); write it again"
        ) from error
    if isinstance(found, Mapping):
        labels = {label: _SPLIT_NAMES.get(label, label) for label in found}
        wanted = "train" if split is None else _SPLIT_NAMES.get(split, split)
        match = [label for label, canonical in labels.items() if canonical == wanted]
        if not match and len(labels) == 1 and split is None:
            match = list(labels)
        if not match:
            raise ValueError(
                f"{name}: holds the splits {', '.join(labels)}, wanted {wanted!r}; name one by "
                "`split:`"
            )
        others = [label for label in labels if label != match[0]]
        if others:
            _note(f"{path}: reads split {match[0]}, not {', '.join(others)}")
        found = found[match[0]]
    elif split is not None:
        raise ValueError(f"{name}: the saved data set has no splits; leave out split {split!r}")
    names = list(getattr(found, "column_names", ()) or ())
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: two columns have the same name; rename one")
    for number, data in enumerate(found, start=1):
        columns = {key: value for key, value in dict(data).items() if value is not None}
        yield checked(columns, f"{path}: row {number}")


def _read_hub(name: str, streaming: bool) -> Iterator[Row | RowError]:
    """Rows of a hub data set."""
    import datasets

    repository, _, rest = name.partition(":")
    # A slice has a colon too, but in brackets: train[:10].
    config, split = re.findall(r"^(?:([\w.-]+):)?(.*)$", rest)[0]
    options: dict[str, Any] = {"split": split if split else "train"}
    if config:
        options["name"] = config
    if streaming and re.fullmatch(r"[\w.-]+", options["split"]):
        options["streaming"] = True
    number = 0
    try:
        for number, data in enumerate(datasets.load_dataset(repository, **options), start=1):
            columns = {key: value for key, value in dict(data).items() if value is not None}
            yield checked(columns, f"{name}: row {number}")
    except Exception as error:  # network, missing repository, missing split: one remedy
        raise ValueError(
            f"{name}: neither a file or folder here nor a readable hub data set "
            f"(after {number} rows: {type(error).__name__}: {error}); correct the path, or give "
            "'owner/name:split' or 'owner/name:config:split'"
        ) from error
