"""SHA-256 digests of a run's inputs: models, data files, tokenizers, texts."""

from __future__ import annotations

import concurrent.futures
import glob
import hashlib
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from jaxalign.data.remote import name_of
from jaxalign.data.sources import split_path
from jaxalign.hf.source import ADAPTER_CONFIG, base_of, is_adapter, locate

_WEIGHTS = ("*.safetensors", "*.gguf", "params/**/*")
_ENDS = 1 << 20  # bytes to read at either end of a file, if not the whole file


def weights_digest(source: str) -> str:
    """The digest of a model's files: weights and shape, byte for byte, without loading them.

    For an adapter it covers its own files and its base's.

    Raises:
      ValueError: no model there.
    """
    path = locate(source, (*_WEIGHTS, "config.json", ADAPTER_CONFIG))
    if path.is_file():
        return _digest({"": path})
    files = [file for pattern in _WEIGHTS for file in path.glob(pattern) if file.is_file()]
    if not files:
        raise ValueError(f"{path}: no weights; wanted one of {', '.join(_WEIGHTS)}")
    named = {file.relative_to(path).as_posix(): file for file in files}
    if is_adapter(path):
        own = _digest(named | {ADAPTER_CONFIG: path / ADAPTER_CONFIG})
        return text_digest(own + weights_digest(base_of(path)))
    return _digest(named | {"config.json": path / "config.json"})


def shape_digest(source: str) -> str | None:
    """The digest of a model's `config.json`; None for a file that also holds weights."""
    path = locate(source, ("config.json",)) / "config.json"
    return _digest({"": path}) if path.is_file() else None


def data_digest(source: str, *, whole: bool) -> str | None:
    """The digest of a data source's files, in the order of their names; None for a hub id.

    Args:
      source: file, folder, `folder:split`, glob or hub id.
      whole: True: every byte; False: only size, beginning and end of each file.
    """
    path, _ = split_path(source)
    if path.is_file():
        return _digest({"": path}, whole)
    if path.is_dir():
        named = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
    else:
        found = map(pathlib.Path, glob.glob(str(path), recursive=True))
        named = {name_of(file): file for file in found if file.is_file()}
    return _digest(named, whole) if named else None


def file_digest(path: str | os.PathLike[str]) -> str | None:
    """The digest of one file; None if it does not exist."""
    file = pathlib.Path(path)
    return _digest({"": file}) if file.is_file() else None


def tokenizer_digest(tok: Any) -> str:
    """The digest of a fast tokenizer's whole definition."""
    return text_digest(tok.backend_tokenizer.to_str())


def text_digest(text: str) -> str:
    """Of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def _digest(named: dict[str, pathlib.Path], whole: bool = True) -> str:
    """The digest of the names and contents of files, read in threads."""
    digest = hashlib.sha256()
    names = sorted(named)
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, own in zip(names, _all(pool, [named[n] for n in names], whole), strict=True):
            digest.update(name.encode())
            digest.update(own)
    return digest.hexdigest()


def _all(
    pool: concurrent.futures.Executor, files: Iterable[pathlib.Path], whole: bool
) -> Iterable[bytes]:
    return pool.map(_whole if whole else _ends, files)


def _whole(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _ends(path: pathlib.Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(_ENDS)
        file.seek(max(0, size - _ENDS))
        return hashlib.sha256(str(size).encode() + first + file.read(_ENDS)).digest()
