"""Reads tensors from a Hugging Face folder of safetensors, in parts.

Format: 8 bytes little-endian header length, a JSON header `{name: {dtype, shape, data_offsets}}`,
then the raw tensors.

We do not use the safetensors library because it maps files into memory. Touched pages stay
resident, so a model is in memory twice while it loads. Copying a 512 MiB file piece by piece into
arrays raises the peak memory of the process by 520 MiB here, and by 1,032 MiB with
`safe_open(...).get_slice` of safetensors 0.8. Here each thread reads pieces into one buffer that it
reuses. For damaged files the error also names the tensor and the bytes.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxalign.data.bounds import check_depth, repeated
from jaxalign.hf import weight_sums
from jaxalign.hf.blocks import Pool, Scratch
from jaxalign.hf.hints import what_lies_there
from jaxalign.hf.source import dtypes_to_remember, read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Supported element types."""

_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1} | {
    f"{kind}{bits}": bits // 8 for kind in "IU" for bits in (16, 32, 64)
}
_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
_MAX_AXES = 64  # numpy's limit
_MIN_SEGMENT = 1 << 16  # bytes; below that, whole rows are faster to read than parts of rows


class _Location(NamedTuple):
    """Position of a tensor's bytes."""

    file: int  # descriptor
    start: int
    dtype: np.dtype


class SafetensorsFolder:
    """The tensors of a folder, in one file or several. Threads may read concurrently.

    Attributes:
      folder: the folder.
      config: `config.json`.
      shapes: tensor name → shape.
      dtypes: tensor name → element type, if supported.
      problems: tensor name → why it cannot be read: duplicate, missing from its file, or not
        floating point.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        there = None if (folder / "config.json").is_file() else what_lies_there(folder)
        if there is not None:
            raise ValueError(f"{folder / 'config.json'} does not exist; {there}")
        self.config = read_json(folder / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, np.dtype] = {}
        self.problems: dict[str, str] = {}
        self._scratch = Scratch()
        self._locations: dict[str, _Location] = {}
        self._files: dict[int, pathlib.Path] = {}
        self._headers: dict[int, _Header] = {}
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor that `index` selects (steps of 1), in the file's dtype.

        The result is valid until the same thread reads again.
        """
        location, shape = self._locations[name], self.shapes[name]
        if not shape:
            out = self._scratch.take(location.dtype.itemsize)
            return self._bytes(location.file, location.start, out).view(location.dtype)[0]
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        (first, last), *inner = bounds
        row = math.prod(shape[1:]) * location.dtype.itemsize  # bytes of x[i]
        element = math.prod(shape[2:]) * location.dtype.itemsize  # bytes of x[i, j]
        low, high = inner[0] if inner else (0, 0)
        segment = (high - low) * element  # contiguous bytes of x[i, low:high]
        if _MIN_SEGMENT <= segment <= row // 2:
            raw = self._scratch.take((last - first) * segment).reshape(last - first, -1)
            for i, out in enumerate(raw, first):
                self._bytes(location.file, location.start + i * row + low * element, out)
            block = raw.view(location.dtype).reshape(last - first, high - low, *shape[2:])
            inner[0] = (0, high - low)
        else:
            out = self._scratch.take((last - first) * row)
            raw = self._bytes(location.file, location.start + first * row, out)
            block = raw.view(location.dtype).reshape(last - first, *shape[1:])
        return block[(slice(None), *(slice(*bound) for bound in inner))]

    @property
    def source_dtypes(self) -> dict[str, str]:
        """The dtypes to remember, see `jaxalign.hf.source.SOURCE_DTYPES`."""
        return dtypes_to_remember(self.dtypes)

    def check_sums(self, pool: Pool, share: tuple[int, int] = (0, 1)) -> None:
        """Compares the tensors with the checksums that the files' headers carry.

        Args:
          pool: threads that read.
          share: (i, n): read the i-th of n processes' shares.

        Raises:
          ValueError: a file is damaged.
        """
        for file, header in list(self._headers.items())[share[0] :: share[1]]:
            path = self._files[file]
            try:
                known = weight_sums.expected(header.checksums)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}; get the file again") from error
            if known is not None and self._total(file, header, known[0], pool) != known[1]:
                raise ValueError(
                    f"{path} is damaged: its tensors have other bytes than were written; get the "
                    "file again"
                )

    def _total(self, file: int, header: _Header, piece: int, pool: Pool) -> str:
        sums = weight_sums.PieceSums()
        spans = []
        for code, shape, offset in header.tensors.values():
            itemsize = DTYPES[code].itemsize
            row = math.prod(shape[1:]) * itemsize
            for rows in weight_sums.piece_rows(shape, itemsize, piece):
                spans.append((offset + rows.start * row, (rows.stop - rows.start) * row))

        def add(span: tuple[int, int]) -> None:
            place, size = span
            sums.add(place, self._bytes(file, header.start + place, self._scratch.take(size)))

        list(pool.map(add, spans))
        return sums.total(header.entries)

    def close(self) -> None:
        """Closes the files."""
        self._locations.clear()
        while self._files:
            os.close(self._files.popitem()[0])

    def _bytes(self, file: int, start: int, out: np.ndarray) -> np.ndarray:
        data, done = out.data, 0
        while done < out.size:
            count = os.preadv(file, [data[done:]], start + done)
            if not count:
                raise ValueError(f"{self._files[file]} became shorter while it was read")
            done += count
        return out

    def _open(self) -> None:
        owner: dict[str, str] = {}
        for name, indexed in sorted(_weight_files(self.folder).items()):
            path = self.folder / name
            file = os.open(path, os.O_RDONLY)
            self._files[file] = path
            header = self._headers[file] = _header(path, file)
            for tensor in sorted(indexed - header.tensors.keys()):
                self.problems[tensor] = f"promised by {INDEX} in {name}, but not there"
            for tensor, (code, shape, offset) in header.tensors.items():
                if tensor in owner:
                    self.problems[tensor] = f"duplicate, in {owner[tensor]} and {name}"
                    continue
                owner[tensor] = name
                self.shapes[tensor] = shape
                if code not in DTYPES:
                    self.problems[tensor] = f"dtype {code}, wanted {', '.join(sorted(DTYPES))}"
                    continue
                self.dtypes[tensor] = DTYPES[code]
                self._locations[tensor] = _Location(file, header.start + offset, DTYPES[code])


def _weight_files(folder: pathlib.Path) -> dict[str, set[str]]:
    """File name → names of the tensors that the index lists in it (none for a single file)."""
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise ValueError(f"{folder} holds both {SINGLE} and {INDEX}; remove the one that is stale")
    if single:
        return {SINGLE: set()}
    if not index:
        there = what_lies_there(folder)
        hint = f"; {there}" if there is not None else ""
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}{hint}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX}: weight_map is missing or empty")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"{folder / INDEX}: {name} points to {file!r}; wanted a file name")
        files.setdefault(file, set()).add(name)
    absent = sorted(file for file in files if not os.path.isfile(folder / file))
    if absent:
        raise ValueError(f"{folder / INDEX} names files that are not there: {', '.join(absent)}")
    return files


# --- headers -------------------------------------------------------------------------------------


class _Header(NamedTuple):
    """The header of a file.

    Attributes:
      tensors: name → (dtype code, shape, offset).
      start: the byte at which the tensors begin.
      entries: name → the header's entry, as read.
      checksums: the text under `weight_sums.KEY`, or None.
    """

    tensors: dict[str, tuple[str, tuple[int, ...], int]]
    start: int
    entries: dict[str, Any]
    checksums: str | None


def _header(path: pathlib.Path, file: int) -> _Header:
    size = os.fstat(file).st_size
    try:
        if size < 8:
            raise ValueError(f"{size} bytes are too few for a header")
        length = int.from_bytes(os.pread(file, 8, 0), "little")
        if length > min(size - 8, _MAX_HEADER):
            raise ValueError(f"its header would be {length} bytes long, the file has {size}")
        header, about = _parse(os.pread(file, length, 8))
        entries = {name: _entry(name, entry) for name, entry in header.items()}
        _check_extents(entries, size - 8 - length)
    except ValueError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file: {error}"
            f"{_looks_like(os.pread(file, 64, 0))}; get the file again"
        ) from error
    tensors = {name: (code, shape, first) for name, (code, shape, first, _) in entries.items()}
    text = about.get(weight_sums.KEY) if isinstance(about, dict) else None
    return _Header(tensors, 8 + length, header, text if isinstance(text, str) else None)


def _parse(text: bytes) -> tuple[dict[str, Any], Any]:
    """(name → entry, metadata)."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if len(set(keys)) < len(keys):
            twice = sorted(repeated(keys))
            more = f" and {len(twice) - 3} more" if len(twice) > 3 else ""
            raise ValueError(f"its header names {', '.join(twice[:3])}{more} twice")
        return dict(items)

    def constant(name: str) -> None:
        raise ValueError(f"its header holds {name}")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
        check_depth(header, text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    about = header.pop("__metadata__", None)
    return header, about


def _entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype code, shape, start, end) of a header's entry."""
    try:
        code, shape, (first, last) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(
            f"its header's entry {name} is {repr(entry)[:200]}, wanted dtype, shape and "
            "data_offsets"
        ) from error
    if isinstance(shape, list) and len(shape) > _MAX_AXES:
        raise ValueError(f"{name} has {len(shape)} axes, wanted at most {_MAX_AXES}")
    numbers = [*shape, first, last] if isinstance(shape, list) and isinstance(code, str) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(
            f"its header's entry {name} holds no sizes and offsets: {repr(entry)[:200]}"
        )
    size = DTYPES[code].itemsize if code in DTYPES else _SIZES.get(code)
    if size is not None and last - first != size * math.prod(shape):
        raise ValueError(
            f"{name} of dtype {code} and shape {shape} takes {size * math.prod(shape)} bytes, its "
            f"offsets {first} to {last} hold {last - first}"
        )
    if last < first:
        raise ValueError(f"{name} has the offsets {first} to {last}")
    return code, tuple(shape), first, last


def _check_extents(entries: dict[str, tuple[str, tuple[int, ...], int, int]], size: int) -> None:
    """Checks that the tensors fill the rest of the file without gaps and overlaps."""
    end, previous = 0, "the header"
    for name, (_, _, first, last) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if last > size:
            raise ValueError(
                f"{name} ends at byte {last} of the data, of which there are {size}: truncated"
            )
        if first != end:
            problem = "overlaps" if first < end else "leaves a gap after"
            raise ValueError(f"{name} {problem} {previous}: it starts at {first}, wanted {end}")
        end, previous = last, name
    if end != size:
        raise ValueError(f"its tensors end at byte {end} of the data, of which there are {size}")


def _looks_like(start: bytes) -> str:
    """A guess, from the first bytes, of what the file is instead of safetensors; for the error."""
    if start.startswith(b"PK"):
        return " (it is a zip archive, as PyTorch pickles weights; it is not opened)"
    if start[:1] == b"\x80" and 2 <= start[1:2][0] <= 5:
        return " (it starts like a pickle, which is never opened because that runs code)"
    if start.startswith(b"GGUF"):
        return " (it is a GGUF file; name it .gguf and give its path)"
    if start.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer; fetch the file itself with `git lfs pull`)"
    return ""
