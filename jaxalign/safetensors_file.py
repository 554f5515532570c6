"""A Hugging Face folder of safetensors: lazy reading, and streamed writing.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`,
then the raw tensors. Reading goes through the safetensors library. Writing is ours, because the
library wants all tensors of a file in memory, and a model may be larger than the host.
"""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.source import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_READABLE = {*_CODES.values(), "F64"}


class SafetensorsFolder:
    """The tensors of a folder, single or sharded, read on demand.

    Attributes:
      folder: where.
      config: `config.json`.
      shapes: tensor name → shape.
      problems: names that cannot be used, with the reason: duplicates, missing from their shard,
        not floating point.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.config = read_json(folder / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.problems: list[str] = []
        self._slices: dict[str, Any] = {}
        self._stack = contextlib.ExitStack()
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor that `index` selects, in the file's dtype."""
        return self._slices[name][index]

    def close(self) -> None:
        """Closes the files."""
        self._slices.clear()
        self._stack.close()

    def _open(self) -> None:
        import safetensors

        owner: dict[str, str] = {}
        promised = _weight_files(self.folder)
        for file, names in sorted(promised.items()):
            path = self.folder / file
            try:
                handle = self._stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
            present = set(handle.keys())
            for name in sorted(names - present):
                self.problems.append(f"{name}: promised by {INDEX} in {file}, but not there")
            for name in sorted(present):
                if name in owner:
                    self.problems.append(f"{name}: duplicate, in {owner[name]} and {file}")
                    continue
                owner[name] = file
                piece = handle.get_slice(name)
                self._slices[name] = piece
                self.shapes[name] = tuple(piece.get_shape())
                if piece.get_dtype() not in _READABLE:
                    kinds = ", ".join(sorted(_READABLE))
                    self.problems.append(f"{name}: dtype {piece.get_dtype()}, wanted {kinds}")


def _weight_files(folder: pathlib.Path) -> dict[str, set[str]]:
    """File name → tensor names that the index promises in it (none for a single file)."""
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is stale")
    if single:
        return {SINGLE: set()}
    if not index:
        pickles = sorted(p.name for p in folder.glob("*.bin")) + sorted(
            p.name for p in folder.glob("*.pt*")
        )
        if pickles:
            raise ValueError(
                f"{folder} holds pickle weights only ({', '.join(pickles[:3])}), which are never "
                f"read because loading them runs code; convert them to safetensors"
            )
        ggufs = sorted(p.name for p in folder.glob("*.gguf"))
        hint = f"; to load {ggufs[0]}, give the path of that file" if ggufs else ""
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: weight_map is missing or empty")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"{folder / INDEX}: {name} points to {file!r}; wanted a file name")
        files.setdefault(file, set()).add(name)
    absent = sorted(file for file in files if not (folder / file).is_file())
    if absent:
        raise ValueError(f"{folder / INDEX} names files that are not there: {', '.join(absent)}")
    return files


class Tensor(NamedTuple):
    """Name, dtype and shape of a tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_sharded(
    folder: pathlib.Path,
    tensors: Sequence[Tensor],
    arrays: Iterable[np.ndarray],
    max_shard_bytes: int,
) -> None:
    """Writes tensors one after another: one file, or several with an index when larger.

    Args:
      folder: an existing folder.
      tensors: what will come.
      arrays: the tensors themselves, in the same order; each is written and let go.
      max_shard_bytes: a file holds at most this much, or one tensor.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    source = iter(arrays)
    if len(shards) == 1:
        _write_file(folder / SINGLE, shards[0], source)
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / file, shard, source)
        weight_map |= {tensor.name: file for tensor in shard}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_file(
    path: pathlib.Path, tensors: Sequence[Tensor], arrays: Iterator[np.ndarray]
) -> None:
    # transformers refuses files that do not say for which framework they were written.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor, array in zip(tensors, arrays, strict=False):
            if array.shape != tensor.shape or array.dtype != tensor.dtype:
                raise RuntimeError(f"{tensor}: got {array.shape} {array.dtype}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
