"""Rows of one process and rows of all: global arrays from what each host has read, and back.

A host's part of a batch is `index` of `count` equal, contiguous parts, in the order of the global
rows. Which one it is follows from the mesh, not from the number of the process: hosts that hold
the same rows (because the mesh splits something else between them) have the same part, and a mesh
that deals out rows in no such order gives every host all of them, of which it places its own.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def host_part(sharding: NamedSharding, shards: int) -> tuple[int, int]:
    """Which part of a batch's rows this process reads: `(index, count)`.

    Args:
      sharding: of rows.
      shards: over how many shards it splits them.
    """
    held: dict[int, set[int]] = {}
    for device, (rows, *_) in sharding.devices_indices_map((shards,)).items():
        held.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
    mine = held[jax.process_index()]
    size = len(mine)
    parts = [set(range(first, first + size)) for first in range(0, shards, size)]
    if any(rows not in parts for rows in held.values()):
        return 0, 1
    return min(mine) // size, shards // size


def place_rows(x: Any, sharding: NamedSharding, part: tuple[int, int]) -> jax.Array:
    """The global array of all hosts' rows.

    Args:
      x: this host's rows, on the host or on a device of its own; or a global array, which is laid
        out anew.
      sharding: of rows.
      part: which of them these are.
    """
    if not is_local(x):
        return reshard_array(x, sharding)
    local = np.asarray(x)
    index, count = part
    first, rows = index * len(local), count * len(local)

    def of(place: Any) -> np.ndarray:
        start, stop, _ = place[0].indices(rows)
        return local[(slice(start - first, stop - first), *place[1:])]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, of)


def host_rows(x: Any, sharding: NamedSharding, part: tuple[int, int]) -> np.ndarray:
    """The part of a global array's rows that `place_rows` would make it from, on the host."""
    if is_local(x):
        return np.asarray(x)
    if part[1] == 1:
        return whole(x)
    pieces: dict[int, Any] = {}
    for shard in reshard_array(x, sharding).addressable_shards:
        pieces[shard.index[0].start] = shard.data
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def whole(x: Any) -> np.ndarray:
    """All of an array on the host of every process; all of them must call this."""
    if is_local(x) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def is_local(x: Any) -> bool:
    """Whether all of an array is in this process: numpy, or on its own devices."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def reshard_array(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """A global array in another layout on the same devices."""
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    return jax.jit(_same, out_shardings=sharding)(x)


def _same(x: jax.Array) -> jax.Array:
    return x
