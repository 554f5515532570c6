"""From logical axes to shardings on a mesh, for parameters, activations and batches.

Only `parallel/rules.py` has the rules that map a logical axis to mesh axes.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxalign.parallel import host_rows
from jaxalign.parallel.mesh import describe
from jaxalign.parallel.rules import Rules, current_rules, use_rules
from jaxalign.types import Params

AnyMesh = Mesh | AbstractMesh

Axes = Mapping[str, Any]
"""Nested dict of logical-axes strings, e.g. `{"kernel": "layers embed mlp"}`."""

T = TypeVar("T")
"""A pytree of arrays; a function's result has the same structure as its argument."""


def partition_spec(
    axes: str, rules: Rules | None = None, mesh: AnyMesh | None = None
) -> PartitionSpec:
    """Turns logical axes (`"embed mlp"`) into a `PartitionSpec`.

    Args:
      axes: names from `rules`, one per dimension. `heads/64` is an axis of heads with 64 entries
        each; a shard holds whole heads.
      rules: logical axis → mesh axis (or axes); None: the rules in effect.
      mesh: concrete or abstract; mesh axes that it lacks are dropped. None: all are kept.

    Raises:
      ValueError: an unknown logical axis, or two axes that map to the same mesh axis.
    """
    entries: list[str | tuple[str, ...] | None] = []
    used: set[str] = set()
    for axis in axes.split():
        names = mesh_axes(axis, mesh, rules, axes)
        clash = used.intersection(names)
        if clash:
            raise ValueError(f"logical axes {axes!r} map to mesh axis {clash.pop()!r} twice")
        used.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def mesh_axes(
    axis: str, mesh: AnyMesh | None, rules: Rules | None = None, axes: str = ""
) -> tuple[str, ...]:
    """The mesh axes that split a logical axis.

    Args:
      axis: the logical axis.
      mesh: mesh axes that it lacks are dropped; None: all are kept.
      rules: logical axis → mesh axes; None: the rules in effect.
      axes: the string that contains `axis`, for the error message.

    Raises:
      ValueError: an unknown logical axis.
    """
    name = axis.partition("/")[0]
    rules = current_rules() if rules is None else rules
    if name not in rules:
        raise ValueError(
            f"unknown logical axis {name!r} in {axes or axis!r}; known: {', '.join(rules)}"
        )
    target = rules[name]
    names = (target,) if isinstance(target, str) else tuple(target or ())
    return tuple(name for name in names if mesh is None or name in mesh.axis_names)


def param_shardings(axes: Any, mesh: Mesh, shapes: Any = None, rules: Rules | None = None) -> Any:
    """Shardings of a parameter tree.

    Args:
      axes: nested dict of logical-axes strings, see `Axes`; or one such string. An axis `embed?` is
        split like `embed` if the shards divide it, and otherwise replicated.
      mesh: the mesh for the parameters.
      shapes: nested dict of arrays or `ShapeDtypeStruct` with the same structure; when given, every
        sharded dimension is checked to divide. Without it, axes with `?` are replicated.
      rules: logical axis → mesh axis; None: the rules in effect.

    Returns:
      A `NamedSharding` for each string of `axes`, in the same structure.

    Raises:
      ValueError: a dimension that the mesh axis does not divide; the message names both and sizes
        that fit.
    """
    if shapes is None:
        axes = jax.tree.map(lambda a: _fitting(a, None, mesh, rules), axes)
    else:
        axes = jax.tree.map(lambda a, s: _fitting(a, s.shape, mesh, rules), axes, shapes)
        jax.tree_util.tree_map_with_path(
            lambda path, a, s: _check_divides(jax.tree_util.keystr(path), a, s.shape, mesh, rules),
            axes,
            shapes,
        )
    return jax.tree.map(lambda a: NamedSharding(mesh, partition_spec(a, rules, mesh)), axes)


def reshard(params: Params, axes: Axes, mesh: Mesh) -> Params:
    """Reshards parameters to a mesh, of the same or other devices, with one `device_put`.

    Args:
      params: nested dict of arrays, on any devices.
      axes: nested dict of their logical axes, `model.axes`.
      mesh: the target.
    """
    return jax.device_put(params, param_shardings(axes, mesh, params))


def reshard_by_rules(params: Params, axes: Axes, over: Rules | None) -> Params:
    """Reshards parameters on their own mesh by overridden rules; None returns them unchanged.

    Args:
      params: nested dict of arrays.
      axes: nested dict of their logical axes, `model.axes`.
      over: logical axis → mesh axes, see `use_rules`.
    """
    mesh = mesh_of(params)
    if not over or mesh is None:
        return params
    with use_rules(over):
        return reshard(params, axes, mesh)


def _fitting(axes: str, shape: tuple[int, ...] | None, mesh: Mesh, rules: Rules | None) -> str:
    """Logical axes without `?`: axes that the mesh does not divide become "hidden"."""
    if "?" not in axes:
        return axes
    found = axes.split()
    for number, axis in enumerate(found):
        if axis.endswith("?"):
            name = axis[:-1]
            shards = math.prod(mesh.shape[n] for n in mesh_axes(name, mesh, rules))
            divides = shape is not None and shape[number] % shards == 0
            found[number] = name if divides else "hidden"
    return " ".join(found)


def _check_divides(
    name: str, axes: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules | None
) -> None:
    partition_spec(axes, rules, mesh)
    for axis, size in zip(axes.split(), shape, strict=True):
        logical, _, unit = axis.partition("/")
        names = mesh_axes(axis, mesh, rules)
        shards = math.prod(mesh.shape[n] for n in names)
        count = size // int(unit or 1)
        if count % shards:
            fits = [d for d in range(1, count + 1) if count % d == 0 and d <= 4096]
            described = f"size {count}" if not unit else f"{count} parts of {unit}"
            raise ValueError(
                f"parameter {name} {shape}: axis {logical!r} has {described}, which mesh axis "
                f"{'×'.join(names)}={shards} does not divide; sizes that would fit: {fits}"
            )


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Constrains an activation to the sharding of its logical axes; returns x without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh=mesh))


def constrain_last(x: jax.Array, axes: str) -> jax.Array:
    """Like `constrain`, but a mesh axis that two dimensions name splits only the last of them.

    Example: token ids `[B, T]` that index a table sharded by `embed` → fsdp, with `rows` → (data,
    fsdp) and `length` → sequence. `constrain` rejects "rows length embed", which uses fsdp twice.
    Here `embed` takes fsdp and `rows` keeps data, so that the ids are split by `(data, sequence)`
    and the looked-up vectors `[B, T, D]` by `(data, sequence, fsdp)`.

    Args:
      x: array; its dimensions are the first axes.
      axes: logical axes, possibly more than x has dimensions. The extra ones only take mesh axes
        away from the others, as `embed` does for the ids.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    taken: set[str] = set()
    entries: list[tuple[str, ...]] = []
    for axis in reversed(axes.split()):
        entries.append(tuple(name for name in mesh_axes(axis, mesh) if name not in taken))
        taken.update(entries[-1])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries[::-1][: x.ndim]))


def axis_shards(axis: str, mesh: Mesh | None = None) -> int:
    """Number of shards of a logical axis on a mesh; None: the mesh in context."""
    current = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(current.shape[name] for name in mesh_axes(axis, current))


def row_shards(mesh: Mesh | None = None) -> int:
    """Number of shards of a batch's rows on a mesh; None: the mesh in context."""
    return axis_shards("rows", mesh)


def row_axes(mesh: Mesh | None = None) -> str:
    """The mesh axes that split rows, for messages: "data × fsdp"."""
    current = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return " × ".join(mesh_axes("rows", current))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of every leaf of a batch: rows split, other dimensions replicated."""
    return NamedSharding(mesh, partition_spec("rows", mesh=mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding with the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh of the first array in a tree that has a `NamedSharding`, or None."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Context that sets the current mesh; with None it does nothing."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def part_of_rows(mesh: Mesh) -> tuple[int, int]:
    """The part of every batch that this process reads: `(index, count)`, for `host=` of the data.

    (0, 1), all rows, with one process.
    """
    return _part_of_rows(rows_sharding(mesh), row_shards(mesh))


_part_of_rows = functools.lru_cache(maxsize=16)(host_rows.host_part)


def shard_batch(batch: T, mesh: Mesh) -> T:
    """Puts a batch on the mesh, rows split over all mesh axes that split rows.

    With several processes, each passes its own rows (see `part_of_rows`) and gets global arrays of
    all rows. Global arrays are resharded if their sharding differs.

    Raises:
      ValueError: the number of rows is not a multiple of the row shards.
    """
    sharding = rows_sharding(mesh)
    shards = row_shards(mesh)
    part = part_of_rows(mesh)

    def place(path: tuple[Any, ...], x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        rows = np.shape(x)[0] * (part[1] if host_rows.is_local(x) else 1)
        if rows % shards:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {rows} rows, which the mesh "
                f"({row_axes(mesh)} = {shards}) does not divide; use a multiple of {shards} rows"
            )
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return host_rows.place_rows(x, sharding, part)

    return jax.tree_util.tree_map_with_path(place, batch)


def local_rows(batch: Any, mesh: Mesh | None = None) -> Any:
    """This process's rows of a batch as numpy arrays; with one process all of them.

    Args:
      batch: arrays whose first axis is rows. `shard_batch` inverts this.
      mesh: the batch's mesh; None: taken from its arrays.
    """
    mesh = mesh_of(batch) if mesh is None else mesh
    if mesh is None or jax.process_count() == 1:
        return jax.device_get(batch)
    sharding, part = rows_sharding(mesh), part_of_rows(mesh)
    return jax.tree.map(lambda x: host_rows.host_rows(x, sharding, part), batch)


def reshard_batch(batch: T, mesh: Mesh) -> T:
    """Reshards a batch to another mesh, with the sharding of `shard_batch`.

    Between meshes of different devices, rows travel through host memory: they are small, and every
    process keeps the same rows.

    Raises:
      ValueError: a process holds different rows on the two meshes.
    """
    source = mesh_of(batch)
    if source is None or set(source.devices.flat) == set(mesh.devices.flat):
        return shard_batch(batch, mesh)
    if part_of_rows(source) != part_of_rows(mesh):
        raise ValueError(
            f"rows on mesh {describe(source.shape)} are to go to mesh {describe(mesh.shape)}, but "
            "hosts have other rows there; give every host the same share of both meshes"
        )
    return shard_batch(local_rows(batch, source), mesh)


def all_gather_rows(batch: Any) -> Any:
    """All rows of a batch as numpy arrays on every process; a collective: all must call it."""
    if jax.process_count() == 1:
        return jax.device_get(batch)
    return jax.tree.map(host_rows.all_gather, batch)
