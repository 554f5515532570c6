"""Copies tensors between files and device shards, a few megabytes at a time.

A *block* is a shard of a parameter leaf that this process's devices hold; replicas share one block.
Loading reads pieces of tensors and copies each into the blocks that contain it; saving does the
reverse. Whatever the model's size, host memory holds this process's blocks of one leaf and one
piece per thread.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import math
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.hf.families import Leaf
from jaxalign.hf.families.table import Tensor
from jaxalign.parallel.host_memory import is_cpu

PIECE = 8 << 20
"""Bytes per piece: small enough for a core's cache."""

_ALIGN = 64  # bytes; JAX puts arrays with this alignment on a CPU device without copying
_TILE = 16  # columns per step of a transposing copy: 16 float32 fill a cache line


class Scratch(threading.local):
    """A reusable buffer per thread: page faults of fresh memory cost more than the copies."""

    def __init__(self):
        self._buffer = np.empty(0, np.uint8)

    def take(self, count: int) -> np.ndarray:
        """An uninitialised buffer of `count` bytes, valid until this thread's next call."""
        if self._buffer.size < count:
            self._buffer = np.empty(count, np.uint8)
        return self._buffer[:count]


class Source(Protocol):
    """A checkpoint whose tensors can be read in parts."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor that `index` selects, valid until this thread's next call."""
        ...


class Block(NamedTuple):
    """Part of a leaf.

    Attributes:
      bounds: for each axis of the leaf a slice with start and stop.
      data: the values.
    """

    bounds: tuple[slice, ...]
    data: np.ndarray


Pool = concurrent.futures.Executor


@contextlib.contextmanager
def workers() -> Iterator[Pool]:
    """A pool of threads for reading, copying and writing: one per core, at most 8."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield pool


def load_leaf(source: Source, leaf: Leaf, dtype: np.dtype, sharding: Any, pool: Pool) -> jax.Array:
    """Reads a leaf into the blocks of this process's devices; reads every piece once.

    Args:
      source: the checkpoint.
      leaf: the leaf.
      dtype: the result's dtype.
      sharding: the result's sharding; None: the default device, uncommitted.
      pool: threads, see `workers`.
    """
    if sharding is None:
        block = empty_block(full_bounds(leaf.shape), dtype)
        read_blocks(source, leaf, [block], pool)
        return jax.device_put(block.data)
    places = sharding.addressable_devices_indices_map(leaf.shape)
    blocks: dict[Any, Block] = {}
    keys = {}
    for device, index in places.items():
        bounds = _bounds(index, leaf.shape)
        keys[device] = tuple((part.start, part.stop) for part in bounds)
        if keys[device] not in blocks:
            blocks[keys[device]] = empty_block(bounds, dtype)
    read_blocks(source, leaf, list(blocks.values()), pool)
    pending = list(keys.values())
    arrays = []
    for device, key in keys.items():
        arrays.append(jax.device_put(blocks[key].data, device))
        pending.remove(key)
        if key not in pending:
            del blocks[key]  # copied to all its devices, so free the host memory
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def full_bounds(shape: Sequence[int]) -> tuple[slice, ...]:
    """The bounds of a whole array."""
    return tuple(slice(0, size) for size in shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def empty_block(bounds: tuple[slice, ...], dtype: np.dtype) -> Block:
    """An uninitialised block, aligned so that a CPU device takes it without a copy."""
    shape = [part.stop - part.start for part in bounds]
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return Block(bounds, raw[start : start + count].view(dtype).reshape(shape))


def read_blocks(source: Source, leaf: Leaf, blocks: Sequence[Block], pool: Pool) -> None:
    """Reads the tensors of a leaf into its blocks.

    Raises:
      ValueError: values too large for the blocks' dtype.
    """
    lead = leaf.stacked
    # The smallest bounds that contain all blocks: nothing else is read.
    outline = [
        slice(min(b.bounds[axis].start for b in blocks), max(b.bounds[axis].stop for b in blocks))
        for axis in range(len(leaf.shape))
    ]
    tasks = []
    itemsizes: dict[str, int] = {}
    for number, position in enumerate(itertools.product(*map(range, leaf.shape[:lead]))):
        targets = [block for block in blocks if _contains(block, position)]
        if targets:
            name = leaf.names[number]
            if name not in itemsizes:
                itemsizes[name] = source.dtypes[name].itemsize
            for part in pieces(leaf, outline[lead:], itemsizes[name]):
                tasks.append((name, position, targets, part))

    def read_piece(task: tuple[str, tuple[int, ...], list[Block], tuple[slice, ...]]) -> None:
        name, position, targets, part = task
        item = source.read(name, leaf.index(part))
        if leaf.transpose:
            item = item.swapaxes(-1, -2)
        for block in targets:
            inside = tuple(i - b.start for i, b in zip(position, block.bounds, strict=False))
            common = intersect(part, block.bounds[lead:])
            if common is not None:
                target = block.data[inside][relative(common, block.bounds[lead:])]
                if not copy(target, item[relative(common, part)]):
                    raise ValueError(
                        f"{name} holds values that {target.dtype} cannot; load it as bfloat16 or "
                        f"float32"
                    )

    list(pool.map(read_piece, tasks))


def _contains(block: Block, position: tuple[int, ...]) -> bool:
    return all(b.start <= i < b.stop for i, b in zip(position, block.bounds, strict=False))


def pieces(leaf: Leaf, outline: Sequence[slice], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cuts part of an item into pieces of about `PIECE` bytes, contiguous in the stored tensor.

    Args:
      leaf: the leaf that the item belongs to.
      outline: bounds of the part.
      itemsize: bytes of an element in the file.
    """
    axis = len(outline) - 1 if leaf.transpose and len(outline) == 2 else 0
    if not outline:
        yield ()
        return
    row = math.prod(leaf.tensor_shape[1:]) * itemsize
    rows = max(1, PIECE // max(1, row))
    start, stop = outline[axis].start, outline[axis].stop
    for first in range(start, stop, rows):
        part = list(outline)
        part[axis] = slice(first, min(first + rows, stop))
        yield tuple(part)


def item_blocks(
    array: jax.Array, leaf: Leaf, position: tuple[int, ...], *, needed: bool = True
) -> list[Block]:
    """An item of a leaf, as blocks in host memory that together cover the item.

    If some process holds only part of the array, the item is all-gathered: then all processes must
    call this for the same items in the same order.

    Args:
      array: the leaf's value.
      leaf: the leaf.
      position: index of the item along the stacked axes.
      needed: whether this process uses the item; if not, it only takes part in the all-gather, and
        the result is [].
    """
    if not _covers(array):
        item = _gather(array, position)
        return [Block(full_bounds(leaf.item_shape), item)] if needed else []
    if not needed:
        return []
    blocks: dict[Any, Block] = {}
    for shard in array.addressable_shards:
        bounds = _bounds(shard.index, leaf.shape)
        key = tuple((part.start, part.stop) for part in bounds)
        if key in blocks or not _contains(Block(bounds, np.empty(0)), position):
            continue
        inside = tuple(i - b.start for i, b in zip(position, bounds, strict=False))
        if is_cpu(shard.device):
            data = np.asarray(shard.data)[inside]  # a view, no copy
        else:
            data = np.asarray(shard.data[inside])  # transfers this item only
        blocks[key] = Block(bounds[leaf.stacked :], data)
    return list(blocks.values())


def _covers(array: jax.Array) -> bool:
    """Whether every process's devices hold the whole array; the same answer on all processes."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return True
    held: dict[int, set[str]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        held.setdefault(device.process_index, set()).add(str(index))
    return all(parts == set().union(*held.values()) for parts in held.values())


def _gather(array: jax.Array, position: tuple[int, ...]) -> np.ndarray:
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding):
        raise ValueError(
            f"a parameter is spread over processes by {type(sharding).__name__}; wanted a layout "
            f"on a mesh (NamedSharding)"
        )
    item = _take(array, position, NamedSharding(sharding.mesh, PartitionSpec()))
    return np.asarray(item.addressable_data(0))


@functools.partial(jax.jit, static_argnums=2)
def _take(array: jax.Array, position: tuple[Any, ...], sharding: NamedSharding) -> jax.Array:
    item = array
    for i in position:
        item = jax.lax.dynamic_index_in_dim(item, i, keepdims=False)
    return jax.lax.with_sharding_constraint(item, sharding)


def gather_tensor_piece(
    tensor: Tensor, blocks: Sequence[Sequence[Block]], rows: slice, out: np.ndarray
) -> bool:
    """Copies rows of an HF tensor from the blocks of its pieces.

    Args:
      tensor: the tensor.
      blocks: for each piece of the tensor, the result of `item_blocks`.
      rows: the rows along the tensor's first axis.
      out: receives the rows; it has the tensor's shape with `rows` along the first axis.

    Returns:
      Whether all values fit into the dtype of `out`.
    """
    fits = True
    bounds = (rows, *full_bounds(tensor.shape[1:])) if tensor.shape else ()
    for piece, parts in zip(tensor.pieces, blocks, strict=True):
        for block in parts:
            place = piece.leaf.index(block.bounds)
            common = intersect(place, bounds)
            if common is not None:
                data = block.data.swapaxes(-1, -2) if piece.leaf.transpose else block.data
                fits &= copy(out[relative(common, bounds)], data[relative(common, place)])
    return fits


def intersect(a: Sequence[slice], b: Sequence[slice]) -> tuple[slice, ...] | None:
    """The intersection of two parts, or None if it is empty."""
    common = tuple(
        slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return common if all(part.start < part.stop for part in common) else None


def relative(part: Sequence[slice], bounds: Sequence[slice]) -> tuple[slice, ...]:
    """Bounds of a part relative to the block that contains it."""
    return tuple(
        slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, bounds, strict=True)
    )


def copy(target: np.ndarray, values: np.ndarray) -> bool:
    """Copies values of any floating-point dtype into an array, in any memory order.

    Returns:
      Whether all values fit: False if a finite value became infinite.
    """
    plain = target.dtype == values.dtype
    narrows = not plain and target.dtype == np.float16
    if plain:
        # Copy as integers: numpy copies those without the GIL, in any memory order.
        integers = np.dtype(f"u{target.itemsize}")
        target, values = target.view(integers), values.view(integers)
    with np.errstate(over="ignore"):
        # The values are the transpose of a row-major array: copy tile by tile, for the cache.
        transposed = target.ndim >= 2 and values.strides[-1] > values.strides[-2]
        if transposed:
            for first in range(0, target.shape[-1], _TILE):
                part = slice(first, first + _TILE)
                target[..., part] = values[..., part]
        else:
            target[...] = values
    return not (narrows and bool(np.any(np.isinf(target) & np.isfinite(values))))
