"""Formats a model's tensors as a table for `jaxalign export` and `import` to print."""

from __future__ import annotations

import re
from collections.abc import Sequence

from jaxalign.hf.safetensors_write import Planned


def tensor_table(tensors: Sequence[Planned]) -> str:
    """One line per parameter leaf, which covers all its layers and experts, and a total.

    Columns: HF names, count × shape, dtype, bytes.
    """
    groups: dict[tuple[str, ...], list[Planned]] = {}
    for planned in tensors:
        # The key of a fused tensor has all its leaves; tensors of one leaf may differ in dtype.
        paths = (*(piece.leaf.path for piece in planned.tensor.pieces), planned.dtype.name)
        groups.setdefault(paths, []).append(planned)
    rows = [("tensors", "shape", "dtype", "bytes")]
    for group in groups.values():
        first, shape = group[0], "×".join(map(str, group[0].tensor.shape))
        rows.append(
            (
                _names(first.tensor.name, group[-1].tensor.name),
                f"{len(group)} × [{shape}]" if len(group) > 1 else f"[{shape}]",
                first.dtype.name,
                f"{sum(planned.nbytes for planned in group):,}",
            )
        )
    dtypes = sorted({planned.dtype.name for planned in tensors})
    total = sum(planned.nbytes for planned in tensors)
    rows.append((f"{len(tensors)} in all", "", " + ".join(dtypes), f"{total:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    byte_width = max(len(row[3]) for row in rows)
    return "\n".join(
        "  ".join(
            [
                *(cell.ljust(n) for cell, n in zip(row, widths, strict=False)),
                row[3].rjust(byte_width),
            ]
        )
        for row in rows
    )


def _names(first: str, last: str) -> str:
    """Joins two names that differ in numbers: "model.layers.{0…29}.mlp.up_proj.weight"."""
    parts = zip(re.split(r"(\d+)", first), re.split(r"(\d+)", last), strict=True)
    return "".join(a if a == b else f"{{{a}…{b}}}" for a, b in parts)
