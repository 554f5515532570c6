"""Global arrays from the rows that each host has read, and back.

A host's part of a batch is `(index, count)`: part `index` of `count` equal, contiguous parts of the
global rows. It follows from the mesh, not from the process number. Hosts that hold the same rows,
because the mesh splits another dimension between them, have the same part. If a mesh assigns rows
to hosts in any other order, every host reads all rows, `(0, 1)`, and places its own.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def host_part(sharding: NamedSharding, shards: int) -> tuple[int, int]:
    """The part of a batch's rows that this process reads: `(index, count)`.

    Args:
      sharding: the sharding of rows.
      shards: the number of shards of rows.
    """
    shards_of: dict[int, set[int]] = {}  # process → the row shards that its devices hold
    for device, (rows, *_) in sharding.devices_indices_map((shards,)).items():
        shards_of.setdefault(device.process_index, set()).update(range(*rows.indices(shards)))
    local = shards_of[jax.process_index()]
    size = len(local)
    contiguous = [set(range(first, first + size)) for first in range(0, shards, size)]
    if any(held not in contiguous for held in shards_of.values()):
        return 0, 1
    return min(local) // size, shards // size


def place_rows(x: Any, sharding: NamedSharding, part: tuple[int, int]) -> jax.Array:
    """The global array of all hosts' rows.

    Args:
      x: this host's rows, in numpy or on its own devices; or a global array, which is resharded.
      sharding: the sharding of rows.
      part: `(index, count)` of this host's rows.
    """
    if not is_local(x):
        return reshard_array(x, sharding)
    local = np.asarray(x)
    index, count = part
    first, rows = index * len(local), count * len(local)

    def shard_data(bounds: Any) -> np.ndarray:
        start, stop, _ = bounds[0].indices(rows)
        return local[(slice(start - first, stop - first), *bounds[1:])]

    return jax.make_array_from_callback((rows, *local.shape[1:]), sharding, shard_data)


def host_rows(x: Any, sharding: NamedSharding, part: tuple[int, int]) -> np.ndarray:
    """Inverts `place_rows`: this host's part of a global array's rows, in numpy."""
    if is_local(x):
        return np.asarray(x)
    if part[1] == 1:
        return all_gather(x)
    pieces: dict[int, jax.Array] = {}
    for shard in reshard_array(x, sharding).addressable_shards:
        pieces[shard.index[0].start] = shard.data  # replicas once
    return np.concatenate([np.asarray(pieces[start]) for start in sorted(pieces)])


def all_gather(x: Any) -> np.ndarray:
    """The whole array in numpy on every process; a collective: all must call it."""
    if is_local(x) or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def is_local(x: Any) -> bool:
    """Whether this process holds the whole array: in numpy, or on its own devices."""
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def reshard_array(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Reshards a global array on the same devices."""
    if x.sharding.is_equivalent_to(sharding, x.ndim):
        return x
    return jax.jit(_same, out_shardings=sharding)(x)


def _same(x: jax.Array) -> jax.Array:
    return x
