"""Meshes: devices in rows along named axes, those that talk most next to each other."""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxalign.parallel.rules import MESH_AXES

_ALWAYS = ("data", "fsdp", "tensor")
"""Axes that a mesh has whatever their size; the others where they are more than 1."""


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    *,
    sequence: int = 1,
    expert: int = 1,
    dcn: Mapping[str, int] | None = None,
) -> Mesh:
    """Arranges the devices into a `data × fsdp × tensor (× sequence × expert)` mesh.

    Args:
      data: replicas of the parameters; the batch is split over them.
      fsdp: shards of parameters and optimizer state; the batch is split over them too.
      tensor: shards of heads, MLP columns and vocabulary.
      devices: which devices; all by default. At most one size may be -1: "the rest".
      sequence: parts of every row, for rows too long for one device: activations are split along
        time, and attention gathers keys and values.
      expert: shards of the experts of a mixture; the batch is split over them too, and for the
        time of a layer's experts the devices of this axis share their tokens.
      dcn: axis → how many of its parts lie in different slices (TPU) or nodes, between which the
        network is slow: with data=4 and dcn={"data": 2} two replicas lie in each of two slices.
        None: as many slices as JAX reports, along the first axes that they divide (`data`, then
        `fsdp`, …). Where JAX reports no slices, hosts count as such.

    Returns:
      A mesh whose axes are all `Auto`: layouts are propagated by the compiler. `sequence` and
      `expert` are among its axes where they are more than 1.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `dcn` does not fit them or
        the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence, "expert": expert}
    for name, size in sizes.items():
        if not isinstance(size, int) or size == 0 or size < -1:
            raise ValueError(
                f"mesh axis {name}={size!r}: wanted a positive integer, or -1 for the rest"
            )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh axes {' and '.join(free)} are both -1; only one can be 'the rest'")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if len(devices) % fixed:
            raise ValueError(
                f"mesh {describe(sizes)}: {fixed} does not divide the {len(devices)} devices; "
                f"choose sizes whose product divides {len(devices)}"
            )
        sizes[free[0]] = len(devices) // fixed
    elif fixed != len(devices):
        raise ValueError(
            f"mesh {describe(sizes)} wants {fixed} devices, there are {len(devices)}; "
            f"set one axis to -1 to take the rest, or pass devices="
        )
    names = [name for name in MESH_AXES if name in _ALWAYS or sizes[name] > 1]
    shape, types = tuple(sizes[name] for name in names), (AxisType.Auto,) * len(names)
    outer = split_over_slices(sizes, devices, dcn)
    if not outer:
        try:
            return jax.make_mesh(shape, tuple(names), types, devices=devices)
        except NotImplementedError:
            # Sizes that are no products of a TPU slice's sides: 64 of 8 × 16 × 16 chips, say.
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, tuple(names), axis_types=types)
    between = [outer.get(name, 1) for name in names]
    within = [size // count for size, count in zip(shape, between, strict=True)]
    placed = mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=len(_groups(devices, "slice_index")) == 1
    )
    return Mesh(np.asarray(placed), tuple(names), axis_types=types)


def set_apart(
    devices: Sequence[jax.Device], counts: Mapping[str, int]
) -> dict[str | None, list[jax.Device]]:
    """Deals out devices: so many to each name, and the rest to None; of every host the same share.

    Args:
      devices: to be dealt out; each host's last ones go to the names.
      counts: name → devices, on all hosts together.

    Raises:
      ValueError: a count that the hosts do not divide, or nothing left for the rest.
    """
    hosts = _groups(devices, "process_index")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1 or count % len(hosts):
            raise ValueError(
                f"mesh apart {name}={count!r}: wanted a positive multiple of {len(hosts)}, the "
                "number of hosts, each of which gives as many devices"
            )
    wanted = sum(counts.values())
    if wanted // len(hosts) >= min(hosts.values()):
        raise ValueError(
            f"mesh apart {', '.join(f'{name}={count}' for name, count in counts.items())}: "
            f"{wanted} of {len(devices)} devices leave none for the rest on some host"
        )
    dealt: dict[str | None, list[jax.Device]] = {None: [], **{name: [] for name in counts}}
    for host in sorted(hosts):
        mine = [device for device in devices if device.process_index == host]
        for name, count in reversed(list(counts.items())):
            share = count // len(hosts)
            dealt[name] += mine[-share:]
            mine = mine[:-share]
        dealt[None] += mine
    return dealt


def split_over_slices(
    sizes: Mapping[str, int], devices: Sequence[jax.Device], dcn: Mapping[str, int] | None
) -> dict[str, int]:
    """How many parts of each axis lie in different slices; {} where there is nothing to arrange.

    Args:
      sizes: of all axes.
      devices: theirs.
      dcn: as `make_mesh` takes it.

    Raises:
      ValueError: `dcn` names no axis, does not divide one, or has not as many parts as there are
        slices; or slices of different sizes.
    """
    slices, what = _groups(devices, "slice_index"), "slices"
    if len(slices) == 1 and dcn is not None:
        slices, what = _groups(devices, "process_index"), "hosts"
    if dcn is None and len(slices) == 1:
        return {}
    if len(set(slices.values())) > 1:
        told = ", ".join(f"{count} of {what[:-1]} {key}" for key, count in slices.items())
        raise ValueError(f"mesh over devices {told}: wanted as many of each")
    if dcn is None:
        # Greedy is enough: the slices' number divides the product of all sizes.
        found, rest = {}, len(slices)
        for name in MESH_AXES:
            found[name] = math.gcd(sizes[name], rest)
            rest //= found[name]
        return found
    for name, count in dcn.items():
        if name not in sizes:
            raise ValueError(f"mesh dcn: no such axis {name!r}; known: {', '.join(MESH_AXES)}")
        if not isinstance(count, int) or count < 1 or sizes[name] % count:
            fits = [d for d in range(1, sizes[name] + 1) if sizes[name] % d == 0]
            raise ValueError(
                f"mesh dcn {name}={count!r} does not divide the axis {name}={sizes[name]}; counts "
                f"that would fit: {fits}"
            )
    wanted = math.prod(dcn.values())
    if wanted != len(slices):
        raise ValueError(
            f"mesh dcn {', '.join(f'{name}={count}' for name, count in dcn.items())} wants "
            f"{wanted} {what}, there are {len(slices)}; use counts whose product is "
            f"{len(slices)}, or leave dcn out"
        )
    return dict(dcn)


def _groups(devices: Sequence[jax.Device], key: str) -> dict[int, int]:
    """How many devices each slice or host has."""
    return dict(collections.Counter(getattr(device, key, 0) for device in devices))


def describe(sizes: Mapping[str, int]) -> str:
    """A mesh in words: "data=2 × fsdp=4 × tensor=1"."""
    told = [name for name in sizes if name in _ALWAYS or sizes[name] != 1]
    return " × ".join(f"{name}={sizes[name]}" for name in told)
