"""Sources of rows: files, folders, globs, hub data sets, dicts.

Every row remembers where it came from, so that whatever is wrong with it can be reported as
`file:line`. `jaxalign.data.files` reads files, row by row; the hub is read by `datasets`.
"""

from __future__ import annotations

import glob
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxalign.data.examples import RowError
from jaxalign.data.files import ROW_SUFFIXES, SUFFIXES, Row, checked, read_file

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+(?=:))?(:[\w.\[\]%+:-]+)?")
# Indices of data sets (LLaMA-Factory's, the hub's) lie beside them and hold no rows.
_NO_ROWS = ("dataset_info.json", "dataset_infos.json")

Source = str | os.PathLike[str] | Mapping[str, Any]
"""A path, glob, folder or hub id (`owner/name[:config][:split]`), or a row itself."""

Sources = Source | Iterable[Source]

OnFault = Callable[[RowError], None] | None
"""What to do with a bad row, instead of raising its error."""


def read_rows(sources: Sources, on_fault: OnFault = None) -> list[Row]:
    """Reads all rows of all sources, in order, into memory.

    Args:
      sources: one source or several: a file (`SUFFIXES`; JSON is a list of objects, or one object
        a line, whatever its suffix), a folder of such files (searched recursively, in the order of
        their names; `.txt` and `dataset_info.json` are passed over), a glob, a hub id
        `owner/name`, `owner/name:split` or `owner/name:config:split` (split: train unless named,
        slices as `train[:1000]`), or a row as a dict. Columns of tables and hub data sets that
        are null, or empty cells of CSV, count as absent.
      on_fault: called with the error of a row that cannot be read, which is then passed over;
        None raises it. What makes a whole file unreadable always raises.

    Returns:
      The rows with their origins.

    Raises:
      ValueError: a missing, empty or unreadable file, invalid UTF-8, malformed JSON, a row that is
        not an object. It names the file, the line and what to do.
    """
    return list(_rows(sources, on_fault, streaming=False))


def iter_rows(sources: Sources, on_fault: OnFault = None) -> Iterator[Row]:
    """The rows of `read_rows`, one at a time, for data that does not fit in memory.

    Files are read line by line (JSONL, CSV, also as gzip) or row group by row group (Parquet); the
    hub by `datasets` in streaming mode (slices of a split are downloaded and mapped instead). A
    JSON file that is one list is held as text while its rows are read.

    Arguments and errors as `read_rows`; an error is raised when its row is reached.
    """
    return _rows(sources, on_fault, streaming=True)


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
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        files = sorted(
            f
            for f in path.rglob("*")
            if f.is_file() and f.name.endswith(ROW_SUFFIXES) and f.name not in _NO_ROWS
        )
        if not files:
            raise ValueError(
                f"{name}: the folder holds no {', '.join(ROW_SUFFIXES)} file; name one"
            )
    elif path.exists():
        files = [path]
    elif _HUB_ID.fullmatch(name) and not name.endswith(SUFFIXES):
        yield from _read_hub(name, streaming)
        return
    elif glob.has_magic(name):
        files = [pathlib.Path(f) for f in sorted(glob.glob(str(path), recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ValueError(f"{name}: no file matches; correct the pattern (** goes into folders)")
    else:
        raise ValueError(
            f"{name}: no such file or folder; correct the path (hub data sets are 'owner/name')"
        )
    for file in files:
        yield from read_file(file)


def _read_hub(name: str, streaming: bool) -> Iterator[Row | RowError]:
    """Rows of a hub data set."""
    import datasets

    repository, _, rest = name.partition(":")
    config, colon, split = rest.rpartition(":")
    if not re.fullmatch(r"[\w.-]*", config):  # the colon of a slice, train[:10]
        config, colon, split = "", "", rest
    options: dict[str, Any] = {"split": split if split else "train"}
    if colon:
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
