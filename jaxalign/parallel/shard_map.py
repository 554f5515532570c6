"""Work on the shards of the mesh in context: for what the compiler would not split by itself.

Everything is said in logical axes; without a mesh in context, everything runs as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.parallel.sharding import axis_shards, mesh_axes, partition_spec, row_shards


def current_device() -> tuple[str, str]:
    """Platform ("cpu", "gpu", "tpu") and kind ("NVIDIA H100 …") of what a program is traced for.

    Those of the mesh in context, whose devices may be absent (ahead-of-time compilation); without
    one, of the default device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    if device is None:
        chosen = getattr(jax.config, "jax_default_device")  # noqa: B009 (a name made at run time)
        if isinstance(chosen, str):
            device = jax.devices(chosen)[0]
        else:
            device = jax.devices()[0] if chosen is None else chosen
    return device.platform, device.device_kind


def map_shards(
    run: Callable[..., jax.Array], args: Sequence[Any], axes: Sequence[Any]
) -> jax.Array:
    """Runs a function on each device with its own part of every argument.

    Args:
      run: its result is laid out as its first argument is.
      args: arrays, or pytrees of them.
      axes: of each argument, its logical axes (for None any), or its `PartitionSpec`s.

    Without a mesh in context, runs it as it stands. A first axis that its shards do not divide is
    whole on every device.
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
    # What is whole on several devices is computed alike on all of them; nothing checks it.
    mapped = jax.shard_map(run, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)
    return mapped(*args)


def gather_shards(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Inside `map_shards`: joins the parts of an array that is split along a logical axis."""
    names = mesh_axes(axis, jax.sharding.get_abstract_mesh())
    return jax.lax.all_gather(x, names, axis=dim, tiled=True) if names else x


def shard_index(axis: str) -> jax.Array:
    """Inside `map_shards`: which part of a logical axis this device holds."""
    names = mesh_axes(axis, jax.sharding.get_abstract_mesh())
    return jax.lax.axis_index(names) if names else jnp.zeros((), jnp.int32)


def layout(axes: str) -> NamedSharding:
    """Logical axes as a sharding on the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return NamedSharding(mesh, partition_spec(axes, mesh=mesh))


def fold_length(x: jax.Array) -> jax.Array:
    """`[B, T, …]` → `[n · B, T / n, …]`, n the shards of time: parts of rows become rows.

    Every device keeps what it has. T is padded with zeros to a multiple of n; `unfold_length`
    turns back.
    """
    parts = axis_shards("length")
    if parts == 1:
        return x
    x = pad_length(x)
    x = x.reshape(x.shape[0], parts, -1, *x.shape[2:]).swapaxes(0, 1)
    return _pin_folded(x.reshape(-1, *x.shape[2:]))


def unfold_length(x: jax.Array, length: int) -> jax.Array:
    """The opposite of `fold_length`, for rows of this length."""
    parts = axis_shards("length")
    if parts == 1:
        return x
    x = _pin_folded(x)
    x = x.reshape(parts, -1, *x.shape[1:]).swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _pin_folded(x: jax.Array) -> jax.Array:
    mesh = jax.sharding.get_abstract_mesh()
    names = (*mesh_axes("length", mesh), *mesh_axes("rows", mesh))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(names))


def pad_length(x: jax.Array, dim: int = 1, multiple: int = 1) -> jax.Array:
    """Pads time with zeros, to a multiple of its shards and of `multiple` in each of them."""
    pad = -x.shape[dim] % (axis_shards("length") * multiple)
    if not pad:
        return x
    return jnp.pad(x, [(0, pad if i == dim else 0) for i in range(x.ndim)])


def map_row_shards(
    run: Callable[..., jax.Array],
    rows: Sequence[jax.Array],
    weights: Any,
    axes: Any,
    *,
    summed: str,
    spread: str,
) -> jax.Array:
    """Runs a function on each device with its own rows, for what the compiler would not split.

    Devices that hold different parts of the weights along `spread` share their rows: each gets the
    rows of all of them, its part of the result counts for all, and the parts are added up.

    Without a mesh in context, or where the rows do not divide over it, runs it as it stands.

    Args:
      run: `(*rows, weights, first) -> rows`, its result partial wherever `summed` or `spread` is
        split; `first` is where its part of `spread` begins.
      rows: arrays `[B, T, …]`.
      weights: nested dict of arrays, gathered but for the axes named.
      axes: the same nested dict, of the logical axes that each array has inside `run`.
      summed: logical axis that `run` contracts; partial results are added up over its shards.
      spread: logical axis, the first one of every array in `weights`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or rows[0].shape[0] % row_shards():
        return run(*rows, weights, 0)
    length = rows[0].shape[1]
    time = "length" if length >= axis_shards("length") else "new"
    if time == "length":
        rows = [pad_length(x) for x in rows]
    split = partition_spec(f"rows {time}", mesh=mesh)
    # Parts that are added up must be of the same rows.
    partition_spec(f"rows {time} {summed}", mesh=mesh)
    summed_over = mesh_axes(summed, mesh)
    spread_over = mesh_axes(spread, mesh)
    rows_over = mesh_axes("rows", mesh)
    alone = sorted(set(spread_over).difference(rows_over))
    if alone:
        raise ValueError(
            f"rule {spread}={spread_over}: devices share their rows along it, so rows must be "
            f"split over it too; {', '.join(alone)} is not among rows={rows_over}"
        )

    def local(rows: Sequence[jax.Array], weights: Any) -> jax.Array:
        first = shard_index(spread) * jax.tree.leaves(weights)[0].shape[0] if spread_over else 0
        rows = [gather_shards(x, spread, 0) for x in rows]
        out = run(*rows, weights, first)
        if spread_over:
            out = jax.lax.psum_scatter(out, spread_over, scatter_dimension=0, tiled=True)
        return jax.lax.psum(out, summed_over) if summed_over else out

    specs = jax.tree.map(lambda a: partition_spec(a, mesh=mesh), axes)
    mapped = jax.shard_map(local, in_specs=(split, specs), out_specs=split)
    return mapped(tuple(rows), weights)[:, :length]
