"""Manual sharding with `jax.shard_map`: explicit collectives where the compiler's are poor.

Functions take logical axes and the mesh in context. Without a mesh they run unsharded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.parallel.sharding import Axes, axis_shards, mesh_axes, partition_spec, row_shards
from jaxalign.types import Params

T = TypeVar("T")
"""A pytree of arrays; a function's result has the same structure as its argument."""


def current_device() -> tuple[str, str]:
    """The platform ("cpu", "gpu", "tpu") and kind ("NVIDIA H100 …") a program is traced for.

    They are those of the mesh in context, whose devices may be absent (ahead-of-time compilation),
    or without a mesh those of the default device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        default = getattr(jax.config, "jax_default_device")  # noqa: B009 (a name made at run time)
        if isinstance(default, str):
            device = jax.devices(default)[0]
        else:
            device = jax.devices()[0] if default is None else default
    return device.platform, device.device_kind


def map_shards(
    run: Callable[..., jax.Array], args: Sequence[Any], axes: Sequence[Any]
) -> jax.Array:
    """Runs a function on every device with the local shard of each argument.

    With rows split over 4 devices and axes `["rows length", "rows"]`, `run` gets `[B/4, T]` and
    `[B/4]` and returns `[B/4, T]`.

    Args:
      run: function of local shards; its result has the axes of its first argument.
      args: arrays, or pytrees of arrays.
      axes: for each argument its logical axes or `PartitionSpec`s; ignored for a None argument.

    Returns:
      The result, sharded like the first argument. Without a mesh in context, `run(*args)`. A first
      axis whose size its shards do not divide stays replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(*args)
    specs = []
    for arg, names in zip(args, axes, strict=True):
        spec = partition_spec(names, mesh=mesh) if isinstance(names, str) else names
        if isinstance(names, str) and jax.tree.leaves(arg):
            rows = jax.tree.leaves(arg)[0].shape[0]
            if rows % axis_shards(names.split()[0]):
                spec = PartitionSpec(None, *spec[1:])
        specs.append(spec)
    # check_vma=False: replicated values are computed identically on every device, unchecked.
    mapped = jax.shard_map(run, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    return mapped(*args)


def gather_shards(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Inside a `shard_map`: all-gathers dimension `dim` over the shards of a logical axis.

    `[…, N/n, …] → […, N, …]` for n shards; an axis without mesh axes returns x.
    """
    names = mesh_axes(axis, jax.sharding.get_abstract_mesh())
    return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def shard_index(axis: str) -> jax.Array:
    """Inside a `shard_map`: the index of this device's shard of a logical axis, int32 []."""
    names = mesh_axes(axis, jax.sharding.get_abstract_mesh())
    return jax.lax.axis_index(names) if names else jnp.zeros((), jnp.int32)


def axis_names(axis: str) -> tuple[str, ...]:
    """The axes of the mesh in context that split a logical axis."""
    return mesh_axes(axis, jax.sharding.get_abstract_mesh())


def pass_on(tree: T, names: tuple[str, ...], parts: int) -> T:
    """Inside a `shard_map`: each device sends its arrays to the next one; the last to the first.

    Args:
      tree: arrays.
      names: the mesh axes to pass along, from `axis_names`.
      parts: the number of devices along them.
    """
    pairs = [(i, (i + 1) % parts) for i in range(parts)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, names, pairs), tree)


def move_split(x: jax.Array, axes: str, old: str, new: str, *, undo: bool = False) -> jax.Array:
    """Moves mesh axes from one dimension of an array to another, with an all-to-all.

    With n devices along `old`, each has `[…, N / n, …, M, …]` before and `[…, N, …, M / n, …]`
    after.

    Args:
      x: an array; n divides both dimensions.
      axes: its logical axes before the move.
      old: the logical axis that gives up its mesh axes.
      new: the logical axis that takes them, after its own mesh axes.
      undo: move in the opposite direction.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names, order = mesh_axes(old, mesh), axes.split()
    before: list[Any] = list(partition_spec(axes, mesh=mesh))
    if x.shape[0] % axis_shards(order[0]):
        before[0] = None
    first, second = order.index(old), order.index(new)
    after = list(before)
    after[first], after[second] = None, (*mesh_axes(new, mesh), *names)
    specs = [PartitionSpec(*before), PartitionSpec(*after)]
    if undo:
        first, second = second, first
        specs.reverse()

    def run(x: jax.Array) -> jax.Array:
        return jax.lax.all_to_all(x, names, split_axis=second, concat_axis=first, tiled=True)

    return jax.shard_map(run, in_specs=specs[0], out_specs=specs[1], check_vma=False)(x)


def named_sharding(axes: str) -> NamedSharding:
    """Logical axes as a `NamedSharding` on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return NamedSharding(mesh, partition_spec(axes, mesh=mesh))


def fold_length(x: jax.Array) -> jax.Array:
    """Turns the n shards of time into rows: `[B, T, …] → [n · B, T/n, …]`.

    No data moves between devices: rows of the result are split over length and rows together. T is
    padded with zeros to a multiple of n. `unfold_length` inverts.
    """
    parts = axis_shards("length")
    if parts == 1:
        return x
    x = pad_length(x)
    # [B, T, …] -> [B, n, T/n, …] -> [n, B, T/n, …]
    x = x.reshape(x.shape[0], parts, -1, *x.shape[2:]).swapaxes(0, 1)
    return _constrain_folded(x.reshape(-1, *x.shape[2:]))  # -> [n · B, T/n, …]


def unfold_length(x: jax.Array, length: int) -> jax.Array:
    """Inverts `fold_length`: `[n · B, T/n, …] → [B, length, …]`."""
    parts = axis_shards("length")
    if parts == 1:
        return x
    x = _constrain_folded(x)
    # [n · B, T/n, …] -> [n, B, T/n, …] -> [B, n, T/n, …]
    x = x.reshape(parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]  # -> [B, length, …]


def _constrain_folded(x: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    names = (*mesh_axes("length", mesh), *mesh_axes("rows", mesh))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(names))


def pad_length(x: jax.Array, dim: int = 1, multiple: int = 1) -> jax.Array:
    """Pads dimension `dim` with zeros to a multiple of n · `multiple`, n the shards of time."""
    pad = -x.shape[dim] % (axis_shards("length") * multiple)
    if not pad:
        return x
    return jnp.pad(x, [(0, pad if i == dim else 0) for i in range(x.ndim)])


def map_row_shards(
    run: Callable[..., jax.Array],
    rows: Sequence[jax.Array],
    weights: Params,
    axes: Axes,
    *,
    contracted: str,
    sharded: str,
) -> jax.Array:
    """Runs a function on every device with its rows and its shard of the weights.

    Experts are the example: `sharded="expert"`, `contracted="mlp"`, with e and m shards, and B rows
    over r shards:

    1. all-gather of the rows over the mesh axes of `sharded`: `[B/r, T, …] → [e · B/r, T, …]`;
    2. `run` with the local weights (experts `[E/e, …, F/m]`), for all these rows;
    3. reduce-scatter over `sharded`, which sums the experts' parts: `→ [B/r, T, …]`;
    4. all-reduce over `contracted`, which sums the parts of the contraction.

    Without a mesh in context, or if r does not divide B, returns `run(*rows, weights, 0)`.

    Args:
      run: `(*rows, weights, first) -> [rows, T, …]`. Its result is a partial sum wherever
        `contracted` or `sharded` is split. `first` is the global index of the first local entry
        of `sharded`, int32 [].
      rows: arrays `[B, T, …]`.
      weights: nested dict of arrays, all-gathered along every axis that `axes` does not name.
      axes: nested dict of the logical axes that each array keeps inside `run`.
      contracted: logical axis that `run` contracts.
      sharded: logical axis of the first dimension of every array in `weights`.

    Raises:
      ValueError: a rule that splits `sharded` over a mesh axis that does not split rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows[0].shape[0] % row_shards():
        return run(*rows, weights, 0)
    length = rows[0].shape[1]
    # Fewer tokens than shards of time, as in a decode step (T = 1): time stays whole.
    time = "length" if length >= axis_shards("length") else "new"
    if time == "length":
        rows = [pad_length(x) for x in rows]
    row_spec = partition_spec(f"rows {time}", mesh=mesh)
    # Partial sums must belong to the same rows: raises if rows or time share an axis with it.
    partition_spec(f"rows {time} {contracted}", mesh=mesh)
    contracted_over = mesh_axes(contracted, mesh)
    sharded_over = mesh_axes(sharded, mesh)
    rows_over = mesh_axes("rows", mesh)
    alone = sorted(set(sharded_over).difference(rows_over))
    if alone:
        raise ValueError(
            f"rule {sharded}={sharded_over}: devices share their rows along it, so rows must be "
            f"split over it too; {', '.join(alone)} is not among rows={rows_over}"
        )

    def local(rows: Sequence[jax.Array], weights: Params) -> jax.Array:
        first = shard_index(sharded) * jax.tree.leaves(weights)[0].shape[0] if sharded_over else 0
        rows = [gather_shards(x, sharded, 0) for x in rows]  # [B/r, T, …] -> [e · B/r, T, …]
        out = run(*rows, weights, first)
        if sharded_over:  # [e · B/r, T, …] -> [B/r, T, …]
            out = jax.lax.psum_scatter(out, sharded_over, scatter_dimension=0, tiled=True)
        return jax.lax.psum(out, contracted_over) if contracted_over else out

    specs = jax.tree.map(lambda a: partition_spec(a, mesh=mesh), axes)
    mapped = jax.shard_map(local, in_specs=(row_spec, specs), out_specs=row_spec)
    return mapped(tuple(rows), weights)[:, :length]
