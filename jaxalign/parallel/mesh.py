"""Device meshes with named axes; the most communication-heavy axes get neighbouring devices."""

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
"""The axes that every mesh has; the others exist only if their size is above 1."""


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
    """Makes a `data × fsdp × tensor (× sequence × expert)` mesh.

    At most one size may be -1, which takes the rest of the devices.

    Args:
      data: replicas of the parameters; the batch is split over them.
      fsdp: shards of parameters and optimizer state; the batch is split over them too.
      tensor: shards of heads, MLP columns and vocabulary.
      devices: None: all devices.
      sequence: shards of time, for rows too long for one device. Activations are split along time;
        attention all-gathers keys and values.
      expert: shards of the experts of a mixture; the batch is split over them too. A layer of
        experts all-gathers the tokens of this axis and reduce-scatters its result.
      dcn: axis → the number of slices (TPU) or nodes over which it is split, across the slow
        network between them. With data=4 and dcn={"data": 2}, each of two slices holds two
        replicas. None: the slices that JAX reports, along the first axes that they divide (`data`,
        then `fsdp`, …). If JAX reports no slices, `dcn` counts hosts.

    Returns:
      A mesh whose axes are all `Auto`: the compiler propagates shardings. `sequence` and `expert`
      are axes only if their size is above 1.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or `dcn` does not fit them or
        the slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _complete_sizes(
        {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence, "expert": expert},
        len(devices),
    )
    names = [name for name in MESH_AXES if name in _ALWAYS or sizes[name] > 1]
    shape, types = tuple(sizes[name] for name in names), (AxisType.Auto,) * len(names)
    outer = split_over_slices(sizes, devices, dcn)
    if not outer:
        try:
            return jax.make_mesh(shape, tuple(names), types, devices=devices)
        except NotImplementedError:
            # Sizes that are not products of a TPU slice's sides: 64 of 8 × 16 × 16 chips, say.
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
            return Mesh(grid, tuple(names), axis_types=types)
    between = [outer.get(name, 1) for name in names]
    within = [size // count for size, count in zip(shape, between, strict=True)]
    grid = mesh_utils.create_hybrid_device_mesh(
        within, between, devices, process_is_granule=len(_group_sizes(devices, "slice_index")) == 1
    )
    return Mesh(np.asarray(grid), tuple(names), axis_types=types)


def _complete_sizes(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """The sizes with -1 replaced, so that their product is the number of devices."""
    sizes = dict(sizes)
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
        if count % fixed:
            raise ValueError(
                f"mesh {describe(sizes)}: {fixed} does not divide the {count} devices; "
                f"choose sizes whose product divides {count}"
            )
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"mesh {describe(sizes)} wants {fixed} devices, there are {count}; "
            f"set one axis to -1 to take the rest, or pass devices="
        )
    return sizes


def split_devices(
    devices: Sequence[jax.Device], counts: Mapping[str, int]
) -> dict[str | None, list[jax.Device]]:
    """Splits devices into one group per name and the rest (key None), evenly over the hosts.

    Args:
      devices: all devices. The named groups get each host's last devices.
      counts: name → number of devices, on all hosts together.

    Raises:
      ValueError: a count that the hosts do not divide, or nothing left for the rest.
    """
    hosts = _group_sizes(devices, "process_index")
    for name, count in counts.items():
        if not isinstance(count, int) or count < 1 or count % len(hosts):
            raise ValueError(
                f"mesh apart {name}={count!r}: wanted a positive multiple of {len(hosts)}, the "
                "number of hosts, each of which gives as many devices"
            )
    total = sum(counts.values())
    if total // len(hosts) >= min(hosts.values()):
        raise ValueError(
            f"mesh apart {', '.join(f'{name}={count}' for name, count in counts.items())}: "
            f"{total} of {len(devices)} devices leave none for the rest on some host"
        )
    groups: dict[str | None, list[jax.Device]] = {None: [], **{name: [] for name in counts}}
    for host in sorted(hosts):
        rest = [device for device in devices if device.process_index == host]
        for name, count in reversed(list(counts.items())):
            share = count // len(hosts)
            groups[name] += rest[-share:]
            rest = rest[:-share]
        groups[None] += rest
    return groups


def split_over_slices(
    sizes: Mapping[str, int], devices: Sequence[jax.Device], dcn: Mapping[str, int] | None
) -> dict[str, int]:
    """The number of slices over which each axis is split; {} for one slice.

    Args:
      sizes: axis → size, of all axes.
      devices: the mesh's devices.
      dcn: see `make_mesh`.

    Raises:
      ValueError: an unknown axis in `dcn`, a count that does not divide its axis, a product that
        differs from the number of slices, or slices of different sizes.
    """
    slices, what = _group_sizes(devices, "slice_index"), "slices"
    if len(slices) == 1 and dcn is not None:
        slices, what = _group_sizes(devices, "process_index"), "hosts"
    if dcn is None and len(slices) == 1:
        return {}
    if len(set(slices.values())) > 1:
        counts = ", ".join(f"{count} of {what[:-1]} {key}" for key, count in slices.items())
        raise ValueError(f"mesh over devices {counts}: wanted as many of each")
    if dcn is None:
        # Greedy is enough: the number of slices divides the product of all sizes.
        outer, rest = {}, len(slices)
        for name in MESH_AXES:
            outer[name] = math.gcd(sizes[name], rest)
            rest //= outer[name]
        return outer
    for name, count in dcn.items():
        if name not in sizes:
            raise ValueError(f"mesh dcn: no such axis {name!r}; known: {', '.join(MESH_AXES)}")
        if not isinstance(count, int) or count < 1 or sizes[name] % count:
            fits = [d for d in range(1, sizes[name] + 1) if sizes[name] % d == 0]
            raise ValueError(
                f"mesh dcn {name}={count!r} does not divide the axis {name}={sizes[name]}; counts "
                f"that would fit: {fits}"
            )
    total = math.prod(dcn.values())
    if total != len(slices):
        raise ValueError(
            f"mesh dcn {', '.join(f'{name}={count}' for name, count in dcn.items())} wants "
            f"{total} {what}, there are {len(slices)}; use counts whose product is "
            f"{len(slices)}, or leave dcn out"
        )
    return dict(dcn)


def _group_sizes(devices: Sequence[jax.Device], key: str) -> dict[int, int]:
    """Slice or host → its number of devices."""
    return dict(collections.Counter(getattr(device, key, 0) for device in devices))


def describe(sizes: Mapping[str, int]) -> str:
    """A mesh for messages: "data=2 × fsdp=4 × tensor=1"."""
    shown = [name for name in sizes if name in _ALWAYS or sizes[name] != 1]
    return " × ".join(f"{name}={sizes[name]}" for name in shown)
