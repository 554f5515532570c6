"""Blocks of tensors between files and devices: the copying that import and export share.

A leaf comes in blocks: what the devices of this process hold of it, replicas once. Loading reads
tensors a few megabytes at a time and copies each piece into the blocks it belongs to; saving goes
the other way. So a host holds its own part of one leaf and one piece a thread, whatever the size
of the model.
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

PIECE = 8 << 20
"""Bytes of a file that a thread handles at a time: few enough to stay in its cache."""

_ALIGN = 64  # bytes; arrays aligned like this become arrays of a CPU device without a copy
_TILE = 16  # rows turned at a time: a cache line of 2-byte numbers in the result


class Scratch(threading.local):
    """A buffer for each thread, kept: fresh memory costs more than what is copied through it."""

    def __init__(self):
        self._buffer = np.empty(0, np.uint8)

    def take(self, count: int) -> np.ndarray:
        """Bytes to write into, uninitialised; the thread's next call takes them back."""
        if self._buffer.size < count:
            self._buffer = np.empty(count, np.uint8)
        return self._buffer[:count]


class Source(Protocol):
    """Where tensors are read from."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of a tensor that `index` selects; good until the thread's next call."""
        ...


class Block(NamedTuple):
    """Part of a leaf.

    Attributes:
      bounds: a slice with start and stop for each axis of the leaf.
      data: its values.
    """

    bounds: tuple[slice, ...]
    data: np.ndarray


Pool = concurrent.futures.Executor


@contextlib.contextmanager
def workers() -> Iterator[Pool]:
    """Threads for reading, copying and writing: as many as there are cores, at most 8."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield pool


def load_leaf(source: Source, leaf: Leaf, dtype: np.dtype, sharding: Any, pool: Pool) -> jax.Array:
    """Reads a leaf straight into the blocks of this process's devices, each piece once.

    Args:
      source: where from.
      leaf: what.
      dtype: of the result.
      sharding: of the result; None for the default device, uncommitted.
      pool: threads, see `workers`.
    """
    if sharding is None:
        block = empty_block(whole(leaf.shape), dtype)
        fill(source, leaf, [block], pool)
        return jax.device_put(block.data)
    places = sharding.addressable_devices_indices_map(leaf.shape)
    blocks: dict[Any, Block] = {}
    keys = {}
    for device, index in places.items():
        bounds = _bounds(index, leaf.shape)
        keys[device] = tuple((part.start, part.stop) for part in bounds)
        if keys[device] not in blocks:
            blocks[keys[device]] = empty_block(bounds, dtype)
    fill(source, leaf, list(blocks.values()), pool)
    left = list(keys.values())
    arrays = []
    for device, key in keys.items():
        arrays.append(jax.device_put(blocks[key].data, device))
        left.remove(key)
        if key not in left:
            del blocks[key]  # on its devices now
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, arrays)


def whole(shape: Sequence[int]) -> tuple[slice, ...]:
    """All of an array, as bounds."""
    return tuple(slice(0, size) for size in shape)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index, shape, strict=True))


def empty_block(bounds: tuple[slice, ...], dtype: np.dtype) -> Block:
    """A block to be filled, aligned so that a CPU device takes it as it is."""
    shape = [part.stop - part.start for part in bounds]
    count = math.prod(shape) * dtype.itemsize
    raw = np.empty(count + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return Block(bounds, raw[start : start + count].view(dtype).reshape(shape))


def fill(source: Source, leaf: Leaf, blocks: Sequence[Block], pool: Pool) -> None:
    """Fills blocks of a leaf from its tensors.

    Raises:
      ValueError: values too large for the blocks' dtype.
    """
    lead = leaf.stacked
    outline = [
        slice(min(b.bounds[axis].start for b in blocks), max(b.bounds[axis].stop for b in blocks))
        for axis in range(len(leaf.shape))
    ]
    tasks = []
    steps = {}
    for number, position in enumerate(itertools.product(*map(range, leaf.shape[:lead]))):
        there = [block for block in blocks if _holds(block, position)]
        if there:
            name = leaf.names[number]
            if name not in steps:
                steps[name] = source.dtypes[name].itemsize
            for part in pieces(leaf, outline[lead:], steps[name]):
                tasks.append((name, position, there, part))

    def one(task: tuple[str, tuple[int, ...], list[Block], tuple[slice, ...]]) -> None:
        name, position, there, part = task
        item = source.read(name, leaf.index(part))
        if leaf.transpose:
            item = item.swapaxes(-1, -2)
        for block in there:
            inside = tuple(i - b.start for i, b in zip(position, block.bounds, strict=False))
            common = intersect(part, block.bounds[lead:])
            if common is not None:
                target = block.data[inside][relative(common, block.bounds[lead:])]
                if not copy(target, item[relative(common, part)]):
                    raise ValueError(
                        f"{name} holds values that {target.dtype} cannot; load it as bfloat16 or "
                        f"float32"
                    )

    list(pool.map(one, tasks))


def _holds(block: Block, position: tuple[int, ...]) -> bool:
    return all(b.start <= i < b.stop for i, b in zip(position, block.bounds, strict=False))


def pieces(leaf: Leaf, outline: Sequence[slice], itemsize: int) -> Iterator[tuple[slice, ...]]:
    """Cuts part of an item into pieces of about `PIECE` bytes that lie together in the tensor.

    Args:
      leaf: whose item.
      outline: which part of the item.
      itemsize: bytes of a number in the file.
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
    """An item of a leaf as blocks in host memory, which together cover it.

    Where this process does not hold all of it, the other processes send the rest: then all of them
    must call this for the same items in the same order.

    Args:
      array: the leaf's value.
      leaf: the leaf.
      position: which item, along the stacked axes.
      needed: whether this process wants it; if not, it only sends its part, and gets [].
    """
    if not _covers(array):
        item = _gather(array, position)
        return [Block(whole(leaf.item_shape), item)] if needed else []
    if not needed:
        return []
    found: dict[Any, Block] = {}
    for shard in array.addressable_shards:
        bounds = _bounds(shard.index, leaf.shape)
        key = tuple((part.start, part.stop) for part in bounds)
        if key in found or not _holds(Block(bounds, np.empty(0)), position):
            continue
        inside = tuple(i - b.start for i, b in zip(position, bounds, strict=False))
        # What is on the host already is looked at in place; a device sends this item only.
        data = np.asarray(shard.data)[inside] if _on_host(shard) else np.asarray(shard.data[inside])
        found[key] = Block(bounds[leaf.stacked :], data)
    return list(found.values())


def _on_host(shard: Any) -> bool:
    return shard.device.platform == "cpu"


def _covers(array: jax.Array) -> bool:
    """Whether the devices of each process hold all of an array; the same answer everywhere."""
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
    """Fills rows of an HF tensor from the blocks of the items that it is made of.

    Args:
      tensor: which.
      blocks: of each of its pieces, as `item_blocks` gives them.
      rows: along the tensor's first axis.
      out: the result, shape of the tensor with `rows` of its first axis.

    Returns:
      whether all values fit into the dtype of `out`.
    """
    fits = True
    bounds = (rows, *whole(tensor.shape[1:])) if tensor.shape else ()
    for piece, parts in zip(tensor.pieces, blocks, strict=True):
        for block in parts:
            # The block in the tensor's own axes.
            place = piece.leaf.index(block.bounds)
            common = intersect(place, bounds)
            if common is not None:
                data = block.data.swapaxes(-1, -2) if piece.leaf.transpose else block.data
                fits &= copy(out[relative(common, bounds)], data[relative(common, place)])
    return fits


def intersect(a: Sequence[slice], b: Sequence[slice]) -> tuple[slice, ...] | None:
    """What two parts have in common, or None."""
    common = tuple(
        slice(max(x.start, y.start), min(x.stop, y.stop)) for x, y in zip(a, b, strict=True)
    )
    return common if all(part.start < part.stop for part in common) else None


def relative(part: Sequence[slice], bounds: Sequence[slice]) -> tuple[slice, ...]:
    """A part counted from the start of the block that contains it."""
    return tuple(
        slice(p.start - b.start, p.stop - b.start) for p, b in zip(part, bounds, strict=True)
    )


def copy(target: np.ndarray, values: np.ndarray) -> bool:
    """Copies values of any floating-point dtype into an array, turned or not.

    Returns:
      whether all values fit: False where a finite one became infinite.
    """
    plain = target.dtype == values.dtype
    narrows = not plain and target.dtype == np.float16
    if plain:
        # As integers: numpy copies those without the interpreter, in any order.
        kind = np.dtype(f"u{target.itemsize}")
        target, values = target.view(kind), values.view(kind)
    with np.errstate(over="ignore"):
        # The slow axis of the values is the fast one of the target.
        turned = target.ndim >= 2 and values.strides[-1] > values.strides[-2]
        if turned:
            for first in range(0, target.shape[-1], _TILE):
                part = slice(first, first + _TILE)
                target[..., part] = values[..., part]
        else:
            target[...] = values
    return not (narrows and bool(np.any(np.isinf(target) & np.isfinite(values))))
