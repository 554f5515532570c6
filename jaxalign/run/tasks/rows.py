"""Checks, before compiling, that batches split evenly and that the model can read them."""

from __future__ import annotations

import math

from jax.sharding import Mesh

from jaxalign.data.extent import Limits
from jaxalign.hf import load_model
from jaxalign.parallel.sharding import row_axes, row_shards
from jaxalign.run.config.base import Run
from jaxalign.run.tasks.parts import RunData


def check_rows(config: Run, mesh: Mesh) -> None:
    """Raises ValueError if a batch does not split evenly over devices, micro- and mini-batches.

    Raises:
      ValueError: the message names what does not divide, and a number that does.
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


def check_fits(config: Run, data: RunData) -> None:
    """Raises ValueError, before loading weights, for data without embeddings or positions.

    Raises:
      ValueError: a token without a row, or rows beyond the learned positions.
    """
    limits = Limits.of(load_model(config.model.source), config.sampled, data.tok)
    for batches in (data.batches, data.held_out):
        if batches is not None:
            batches.check_model(limits)


def _nearest(rows: int, unit: int) -> int:
    return max(unit, round(rows / unit) * unit)
