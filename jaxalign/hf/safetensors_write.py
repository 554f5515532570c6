"""Writes safetensors: assigns tensors to files and files to processes, and writes in pieces.

We do not use the safetensors library because `save_file` needs all tensors of a file as arrays in
host memory, by default 5 GB, and a single tensor may be sharded over hosts. Here a thread gathers
and writes `blocks.PIECE` bytes (8 MiB) at a time.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.hf import weight_sums
from jaxalign.hf.blocks import PIECE, Block, Pool, Scratch, gather_tensor_piece
from jaxalign.hf.families.table import Tensor
from jaxalign.hf.safetensors_file import DTYPES, INDEX, SINGLE

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Planned(NamedTuple):
    """A tensor and the dtype in which it is saved."""

    tensor: Tensor
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.dtype.itemsize * math.prod(self.tensor.shape)


class File(NamedTuple):
    """Plan of one weight file.

    Attributes:
      name: its name in the folder.
      tensors: its contents, in order.
      owner: index of the process that writes it.
    """

    name: str
    tensors: tuple[Planned, ...]
    owner: int


def plan_files(tensors: Sequence[Planned], max_bytes: int, processes: int) -> list[File]:
    """Assigns tensors to files in order, and files to processes round-robin.

    Args:
      tensors: all tensors, in order.
      max_bytes: the size limit of a file; a larger tensor gets its own file.
      processes: number of processes that write.
    """
    parts: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if parts[-1] and size + tensor.nbytes > max_bytes:
            parts.append([])
            size = 0
        parts[-1].append(tensor)
        size += tensor.nbytes
    count = len(parts)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = [SINGLE]
    return [
        File(name, tuple(part), number % processes)
        for number, (name, part) in enumerate(zip(names, parts, strict=True))
    ]


def index_of(files: Sequence[File]) -> dict[str, Any] | None:
    """The contents of the index file; None for a single weight file, which has no index."""
    if len(files) == 1:
        return None
    weight_map = {planned.tensor.name: file.name for file in files for planned in file.tensors}
    total = sum(planned.nbytes for file in files for planned in file.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def write_index(folder: pathlib.Path, files: Sequence[File]) -> None:
    """Writes the index file, if there are several weight files."""
    index = index_of(files)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class Writer:
    """Writes one file; tensors may be written in any order."""

    def __init__(self, folder: pathlib.Path, file: File, pool: Pool):
        self._pool, self._scratch, self._sums = pool, Scratch(), weight_sums.PieceSums()
        # transformers rejects files whose metadata names no framework.
        about = {"format": "pt", weight_sums.KEY: weight_sums.metadata(PIECE)}
        header: dict[str, Any] = {}
        self._starts: dict[str, int] = {}
        offset = 0
        for planned in file.tensors:
            name = planned.tensor.name
            header[name] = {
                "dtype": _CODES[planned.dtype],
                "shape": list(planned.tensor.shape),
                "data_offsets": [offset, offset + planned.nbytes],
            }
            self._starts[name] = offset
            offset += planned.nbytes
        self._entries = header
        text = json.dumps({"__metadata__": about} | header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligns the tensors to 8 bytes
        head = len(text).to_bytes(8, "little") + text
        self._head = head
        self._file = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _write(self._file, memoryview(head), 0)

    def write(self, planned: Planned, blocks: Sequence[Sequence[Block]]) -> None:
        """Writes a tensor.

        Args:
          planned: a tensor of this file.
          blocks: for each piece of the tensor, the result of `item_blocks`.

        Raises:
          ValueError: values too large for the dtype.
        """
        tensor, start = planned.tensor, self._starts[planned.tensor.name]
        row = math.prod(tensor.shape[1:]) * planned.dtype.itemsize

        def write_rows(rows: slice) -> None:
            shape = (rows.stop - rows.start, *tensor.shape[1:]) if tensor.shape else ()
            count = math.prod(shape) * planned.dtype.itemsize
            out = self._scratch.take(count).view(planned.dtype).reshape(shape)
            if not gather_tensor_piece(tensor, blocks, rows, out):
                raise ValueError(
                    f"{tensor.name} holds values that {planned.dtype} cannot; save it as bfloat16 "
                    f"or float32"
                )
            data = np.atleast_1d(out).reshape(-1).view(np.uint8).data
            place = start + rows.start * row
            self._sums.add(place, data)
            _write(self._file, data, len(self._head) + place)

        rows = weight_sums.piece_rows(tensor.shape, planned.dtype.itemsize, PIECE)
        list(self._pool.map(write_rows, rows))

    def close(self) -> None:
        """Completes the header with the checksum of what was written, and closes the file."""
        head = weight_sums.fill_in(self._head, self._sums.total(self._entries))
        _write(self._file, memoryview(head), 0)
        os.close(self._file)


def _write(file: int, data: memoryview, start: int) -> None:
    while data:  # pwrite may write less than asked
        count = os.pwrite(file, data, start)
        data, start = data[count:], start + count
