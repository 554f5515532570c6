"""Parses the header of a GGUF file: metadata, and the position of each tensor.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3.

We do not use the reader of PyPI's `gguf` because it builds several Python objects for every token
of the vocabulary, which takes seconds, and maps the whole file into memory. That package does
decode quantised blocks.
"""

from __future__ import annotations

import collections
import math
import mmap
import os
import pathlib
import struct
from typing import Any, NamedTuple

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_MAX_AXES = 4
_MAX_NESTED = 4  # the maximum nesting of arrays
MAX_STRING = 64 * 2**20
"""The maximum bytes of a string; chat templates have some 10 KiB."""
MAX_VALUES = 2**24
"""The maximum elements of all arrays; a vocabulary of 256,000 tokens needs less than 2 million."""
MAX_TENSORS = 2**20
"""The maximum number of tensors in a file."""


class Tensor(NamedTuple):
    """A tensor in the file.

    Attributes:
      name: GGUF name.
      kind: element type, a value of `gguf.GGMLQuantizationType`.
      shape: in numpy's order (GGUF stores it reversed).
      start: offset in the file, bytes.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    start: int


class Metadata:
    """Metadata and tensor positions of a GGUF file.

    Attributes:
      path: the file.
      tensors: in the file's order.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < 24:
                    raise ValueError("too short for a header")
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._values, self.tensors = _Parser(data).parse()
        except (ValueError, KeyError, OSError, OverflowError, struct.error) as error:
            raise ValueError(
                f"{path} is not a readable GGUF file: {error}; get the file again"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key as plain Python (strings, numbers, lists), or the default."""
        return self._values.get(key, default)

    def need(self, key: str) -> Any:
        """The value of a required key.

        Raises:
          ValueError: the key is missing.
        """
        value = self.get(key)
        if value is None:
            raise ValueError(f"{self.path}: metadata key {key} is missing")
        return value


class _Parser:
    def __init__(self, data: mmap.mmap):
        self.data = data
        self.position = 0
        self.values = 0  # elements of arrays so far

    def parse(self) -> tuple[dict[str, Any], list[Tensor]]:
        magic, version = self.take(4), self.scalar("I")
        if magic != _MAGIC:
            raise ValueError(f"it starts with {magic!r}, wanted {_MAGIC!r}")
        if version not in _VERSIONS:
            hint = " (written for a big-endian machine)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"version {version}{hint}; supported: little-endian 2 and 3")
        tensor_count, value_count = self.scalar("Q"), self.scalar("Q")
        if tensor_count > MAX_TENSORS:
            raise ValueError(
                f"{tensor_count} tensors, wanted at most {MAX_TENSORS}: it is truncated or damaged"
            )
        values: dict[str, Any] = {}
        for _ in range(value_count):
            key = self.string()
            if key in values:
                raise ValueError(f"metadata key {key} appears twice")
            values[key] = self.value(self.scalar("I"))
        relative = [self.tensor() for _ in range(tensor_count)]
        align = values.get("general.alignment", 32)
        if not isinstance(align, int) or align < 1:
            raise ValueError(f"general.alignment={align!r}: wanted a positive number")
        start = -(-self.position // align) * align
        tensors = [tensor._replace(start=start + tensor.start) for tensor in relative]
        counts = collections.Counter(tensor.name for tensor in tensors)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"tensors {', '.join(twice)} appear twice")
        for tensor in tensors:
            end = tensor.start + nbytes(tensor)
            if end > len(self.data):
                raise ValueError(
                    f"tensor {tensor.name} ends at byte {end}, the file has {len(self.data)}: "
                    f"truncated"
                )
        return values, tensors

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise ValueError(
                f"{count} bytes wanted at {self.position}, of {len(self.data)}: truncated"
            )
        self.position += count
        return self.data[self.position - count : self.position]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        size = self.scalar("Q")
        if size > MAX_STRING:
            raise ValueError(
                f"a string of {size} bytes at {self.position}, wanted at most {MAX_STRING}: it is "
                "truncated or damaged"
            )
        return self.take(size).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"metadata of unknown type {kind} at byte {self.position}")
        inner, count = self.scalar("I"), self.scalar("Q")
        if count > len(self.data):
            raise ValueError(f"an array of {count} values in a file of {len(self.data)} bytes")
        self.values += count
        if self.values > MAX_VALUES or depth >= _MAX_NESTED:
            raise ValueError(
                f"arrays of {self.values} values, {depth + 1} within each other; wanted at most "
                f"{MAX_VALUES} and {_MAX_NESTED}"
            )
        if inner in _SCALARS:
            code = f"<{count}{_SCALARS[inner]}"
            return list(struct.unpack(code, self.take(struct.calcsize(code))))
        return [self.value(inner, depth + 1) for _ in range(count)]

    def tensor(self) -> Tensor:
        name, axes = self.string(), self.scalar("I")
        if axes > _MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} axes")
        shape = tuple(self.scalar("Q") for _ in range(axes))
        return Tensor(name, self.scalar("I"), shape[::-1], self.scalar("Q"))


def block_size(tensor: Tensor) -> tuple[int, int]:
    """Elements and bytes of a quantisation block: `(elements, bytes)`.

    Raises:
      ValueError: an element type that PyPI's gguf does not know.
    """
    import gguf

    try:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)]
    except (ValueError, KeyError) as error:
        raise ValueError(f"tensor {tensor.name} has the unknown type {tensor.kind}") from error


def nbytes(tensor: Tensor) -> int:
    """Size of a tensor in the file, bytes.

    Raises:
      ValueError: rows that are not a whole number of blocks.
    """
    numbers, size = block_size(tensor)
    if tensor.shape and tensor.shape[-1] % numbers:
        raise ValueError(
            f"tensor {tensor.name} has rows of {tensor.shape[-1]} numbers, which is no multiple of "
            f"its type's blocks of {numbers}"
        )
    return math.prod(tensor.shape) // numbers * size
