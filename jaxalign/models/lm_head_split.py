"""How a mesh splits the language-model head: by batch rows, and by the head's rows and columns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from jaxalign.parallel.sharding import mesh_axes


class Operands(NamedTuple):
    """The inputs of both passes, or the `PartitionSpec` of each.

    Attributes:
      hidden: `[R, N, D]`.
      head: `[D, V]`.
      targets: int32 `[R, N]`.
      temperature: float32 scalar.
      num_valid: int32 scalar or None, see `fused_logprobs`.
    """

    hidden: Any
    head: Any
    targets: Any
    temperature: Any
    num_valid: Any


class HeadSplit(NamedTuple):
    """How the mesh in context splits the head's work: names of mesh axes, () for none.

    Attributes:
      rows: mesh axes that shard the rows R of hidden states, targets and results.
      vocabulary: mesh axes that shard the head's columns V.
      embed: the axes among `rows` that shard the head's rows D between steps (FSDP).
    """

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    @property
    def by_row(self) -> PartitionSpec:
        """The spec of arrays `[R, N, …]`."""
        return PartitionSpec(self.rows or None)

    @property
    def sharded_head(self) -> PartitionSpec:
        """The spec of the head `[D, V]` between steps, and of its gradient."""
        return PartitionSpec(self.embed or None, self.vocabulary or None)

    @property
    def gathered_head(self) -> PartitionSpec:
        """The spec of the head `[D, V]` with all its rows on every device."""
        return PartitionSpec(None, self.vocabulary or None)

    def operands(self, head: PartitionSpec) -> Operands:
        """The specs of `Operands`, with the head as given."""
        whole = PartitionSpec()
        return Operands(self.by_row, head, self.by_row, whole, whole)

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *args: Any) -> Any:
        """Runs a function on each device with its part of every argument.

        Args:
          function: returns its part of the results.
          in_specs: a `PartitionSpec` for each argument, or a pytree of them.
          out_specs: the same for its results.
          *args: whole arrays.
        """
        if not self.rows and not self.vocabulary:
            return function(*args)
        # Devices with the same part of an argument compute the same; this is not checked.
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*args)


def head_split(rows: int, width: int, vocabulary: int) -> HeadSplit:
    """How the mesh in context splits a head `[D, V]` and R rows, by the axes that divide them.

    Args:
      rows: R.
      width: D.
      vocabulary: V.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return HeadSplit()

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        names = tuple(name for name in names if mesh.shape[name] > 1)
        return () if size % math.prod(mesh.shape[name] for name in names) else names

    axes = functools.partial(mesh_axes, mesh=mesh)
    row_axes = dividing((*axes("length"), *axes("rows")), rows)
    embed_axes = dividing(tuple(name for name in axes("embed") if name in row_axes), width)
    # Parts of the vocabulary are combined across devices that hold the same rows.
    vocabulary_axes = tuple(name for name in axes("vocab") if name not in row_axes)
    return HeadSplit(row_axes, dividing(vocabulary_axes, vocabulary), embed_axes)


def vocabulary_shards(rows: int, vocabulary: int) -> int:
    """The number of devices of the mesh in context over which the head's V columns are split."""
    mesh, split = jax.sharding.get_abstract_mesh(), head_split(rows, 1, vocabulary)
    return math.prod(mesh.shape[name] for name in split.vocabulary)
