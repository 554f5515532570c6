"""Whether batches can be split evenly, before anything is loaded, compiled or sampled."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from jaxalign.parallel.sharding import row_axes, row_shards
from jaxalign.run.config.base import Run


def check_rows(config: Run, mesh: Mesh) -> None:
    """Refuses a batch that cannot be split evenly over devices, micro-batches and mini-batches.

    Raises:
      ValueError: what does not divide, and what would.
    """
    rows, sequences = config.data.rows, config.sequences
    name = "rows" if sequences == rows else "answers (× ppo.samples)"
    parts = {row_axes(mesh): row_shards(mesh)} | config.row_parts
    unit = math.prod(parts.values())
    if sequences % unit:
        raise ValueError(
            f"data.rows={rows}: {sequences} {name} do not divide into "
            f"{', '.join(f'{option} = {size}' for option, size in parts.items())}; "
            f"use a multiple of {unit} {name}, the nearest is {_nearest(sequences, unit)}"
        )
    for model in config.mesh.apart:
        unit = row_shards(config.mesh.make(model=model))
        if sequences % unit:
            raise ValueError(
                f"data.rows={rows}: {sequences} {name} do not divide over "
                f"mesh.apart.{model} = {unit} devices; use a multiple of {unit} {name}, the "
                f"nearest is {_nearest(sequences, unit)}"
            )
    for section, (data, cut) in config.text_sections.items():
        unit = row_shards(mesh) * cut
        if data.rows % unit:
            raise ValueError(
                f"{section}.rows={data.rows}: the rows do not divide over the mesh and its "
                f"micro-batches; use a multiple of {unit} rows, the nearest is "
                f"{_nearest(data.rows, unit)}"
            )


def _nearest(rows: int, unit: int) -> int:
    return max(unit, round(rows / unit) * unit)
