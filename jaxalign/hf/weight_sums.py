"""Checksums in a safetensors file's own header, so that they stay with the file.

The header's `__metadata__` has, under `jaxalign_checksums`, the checksum of the file's tensors.
Other tools may keep or drop it; a file without a checksum is loaded unchecked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import xxhash

from jaxalign.data.bounds import parse_json

KEY = "jaxalign_checksums"
_ALGORITHM = "xxh3_128 of the xxh3_128 of each piece"
_UNKNOWN = "0" * 32  # in the header until all tensors are written


def piece_rows(shape: tuple[int, ...], itemsize: int, piece: int) -> Iterator[slice]:
    """Splits a tensor's rows into pieces of about `piece` bytes."""
    count = shape[0] if shape else 1
    step = max(1, piece // max(1, math.prod(shape[1:]) * itemsize))
    for first in range(0, count, step):
        yield slice(first, min(first + step, count))


def metadata(piece: int) -> str:
    """The value of `KEY` before the tensors are known; one checksum covers `piece` bytes."""
    values = {"algorithm": _ALGORITHM, "piece": piece, "tensors": _UNKNOWN}
    return json.dumps(values, separators=(",", ":"))


def fill_in(head: bytes, total: str) -> bytes:
    """Fills the tensors' checksum into the place that `metadata` reserved in a header."""
    return head.replace(_UNKNOWN.encode(), total.encode(), 1)


class PieceSums:
    """Collects the checksums of pieces, which threads write or read in any order."""

    def __init__(self) -> None:
        self._sums: dict[int, bytes] = {}

    def add(self, start: int, data: Any) -> None:
        """Adds the bytes that begin at byte `start` of the tensors."""
        self._sums[start] = xxhash.xxh3_128_digest(data)

    def total(self, entries: Mapping[str, Any]) -> str:
        """The checksum of all pieces, and of the tensors' names, types, shapes and positions."""
        whole = xxhash.xxh3_128(json.dumps(entries, sort_keys=True).encode())
        for start in sorted(self._sums):
            whole.update(self._sums[start])
        return whole.hexdigest()


def expected(text: str | None) -> tuple[int, str] | None:
    """(bytes per piece, checksum of the tensors), or None if there is no checksum.

    Raises:
      ValueError: the text is damaged.
    """
    if text is None:
        return None
    try:
        values = parse_json(text)
        if values["algorithm"] != _ALGORITHM:
            return None  # from another version
        return max(1, int(values["piece"])), str(values["tensors"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError("the checksums in its header are damaged") from error
