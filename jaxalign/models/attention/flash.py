"""Flash attention with documents, branches, windows and soft caps: Pallas kernels for GPUs.

The mask remains a few integers per token. Pairs of query and key blocks that are fully masked are
never read: blocks above the diagonal, of other documents, of other branches, or outside the window.
The remaining pairs are listed beforehand, from the minimum and maximum integer of each block. So a
packed row costs as much as its documents, and every branch reads a shared prompt once.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxalign.models.attention import flash_kernels
from jaxalign.models.attention.flash_kernels import Lists, Tokens
from jaxalign.models.attention.mask import Segments
from jaxalign.models.backend import backend
from jaxalign.parallel.shard_map import gather_shards, shard_index
from jaxalign.parallel.sharding import axis_shards
from jaxalign.parallel.zigzag import zigzag_columns

_FAR = 2**30
"""Larger than every segment, position, branch and column; differences still fit int32."""


class Tile(NamedTuple):
    """How a kernel splits its work.

    Attributes:
      queries: queries per block, a power of two from 16 on.
      keys: keys per block, likewise.
      warps: warps of 32 threads that share a block.
      stages: blocks that are loaded while one is computed.
    """

    queries: int
    keys: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """The tile of each kernel."""

    forward: Tile
    to_queries: Tile
    to_keys: Tile


TILES: dict[int, Tiles] = {
    64: Tiles(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 3)),
    128: Tiles(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2)),
}
"""Widest head → tiles. What is loaded fits the 163 KiB of shared memory that a block gets on an
A100, and what adds up fits the registers: a thread has 255. Forward at a width of 128, bfloat16:
queries 32 KiB and 3 stages of keys and values 96 KiB; 128 × 128 sums over 256 threads are 64
registers. Not measured."""


class Options(NamedTuple):
    """Static options.

    Attributes:
      softcap: the soft cap of the scores, or None.
      tiles: the tiles of each kernel.
      interpret: run in Pallas' interpreter.
    """

    softcap: float | None
    tiles: Tiles
    interpret: bool


def flash(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: Segments,
    key_segments: Segments, windowed: jax.Array | None, *, window: int | None,
    softcap: float | None, zigzag: bool = False,
) -> jax.Array:  # fmt: skip
    """Flash attention on one device; `map_shards` runs it.

    Off GPUs the kernels run in Pallas' interpreter, which is slow and for tests.

    Args:
      query: `[B, T, H, d]`, scaled; d at most 256.
      key: `[B, T, K, d]`, as much of the row as the query.
      value: `[B, T, K, d]`.
      query_segments: segments of this device's queries.
      key_segments: segments of the whole rows.
      windowed: bool `[1]`, whether the window applies; None: it does.
      window: how many positions a query attends to, including its own; None: all.
      softcap: the soft cap of the scores, or None.
      zigzag: the tokens of every row are in zigzag order.

    Returns:
      `[B, T, H, d]`; 0 for padding.
    """
    key, value = (gather_shards(x, "length", 1) for x in (key, value))
    length, width = query.shape[1], query.shape[3]
    options = Options(softcap, _tiles(width, length), backend().triton_interpret)
    limit = jnp.full(1, _FAR, jnp.int32)
    if window is not None:
        limit = jnp.full(1, window, jnp.int32)
        limit = limit if windowed is None else jnp.where(windowed, limit, _FAR)
    columns = jnp.arange(key.shape[1], dtype=jnp.int32)
    if zigzag:
        columns = jnp.asarray(zigzag_columns(key.shape[1], axis_shards("length")))
    first = shard_index("length") * length
    own = jax.lax.dynamic_slice_in_dim(columns, first, length)
    query_tokens = _tokens(query_segments, own, window is not None, padding=-1)
    key_tokens = _tokens(key_segments, columns, window is not None, padding=0)
    # Padding belongs to no document: no query attends to it, and it attends to no key.
    query, query_tokens = _pad(options, query, query_tokens, padding=-1)
    key, key_tokens = _pad(options, key, key_tokens, padding=0)
    value = jnp.pad(value, [(0, n - m) for m, n in zip(value.shape, key.shape, strict=True)])
    out = _flash(options, query, key, value, query_tokens, key_tokens, limit)
    return out[:, :length, :, :width]


def _tiles(width: int, length: int) -> Tiles:
    """Tiles for heads of a width; for short rows, smaller ones."""
    widest = min((w for w in TILES if w >= width), default=None)
    if widest is None:
        raise ValueError(f"flash attention has heads of at most {max(TILES)}; got {width}")
    most = max(16, pl.next_power_of_2(length))
    tiles = (
        tile._replace(queries=min(tile.queries, most), keys=min(tile.keys, most))
        for tile in TILES[widest]
    )
    return Tiles(*tiles)


def _tokens(segments: Segments, columns: jax.Array, windows: bool, *, padding: int) -> Tokens:
    ids = jnp.asarray(segments.ids, jnp.int32)
    columns = jnp.broadcast_to(columns[None], ids.shape)
    positions = jnp.asarray(segments.positions, jnp.int32) if windows else None
    return Tokens(columns, jnp.where(ids > 0, ids, padding), positions, segments.branches)


def _pad(
    options: Options, x: jax.Array, tokens: Tokens, *, padding: int
) -> tuple[jax.Array, Tokens]:
    """Pads lengths to whole blocks of every kernel, and heads to a power of two."""
    multiple = max(size for tile in options.tiles for size in tile[:2])
    width = max(16, pl.next_power_of_2(x.shape[-1])) - x.shape[-1]
    length = -x.shape[1] % multiple
    if not length and not width:
        return x, tokens
    ends = ((0, 0), (0, length))
    ids = jnp.pad(tokens.ids, ends, constant_values=padding)
    tokens = jax.tree.map(lambda t: jnp.pad(t, ends), tokens)._replace(ids=ids)
    return jnp.pad(x, (*ends, (0, 0), (0, width))), tokens


class _Range(NamedTuple):
    """The minimum and maximum of a value in each block, without padding: `[B, n]`."""

    least: jax.Array
    most: jax.Array


def _ranges(tokens: Tokens, size: int) -> Tokens:
    real = tokens.ids > 0

    def one(x: jax.Array) -> _Range:
        blocks = (x.shape[0], -1, size)
        least, most = jnp.where(real, x, _FAR), jnp.where(real, x, -1)
        return _Range(least.reshape(blocks).min(-1), most.reshape(blocks).max(-1))

    return Tokens(*(None if x is None else one(x) for x in tokens))


def visible_blocks(
    query: Tokens, key: Tokens, limit: jax.Array, queries: int, keys: int
) -> jax.Array:
    """Which pairs of blocks may contain an unmasked pair of query and key.

    It is never False for a pair that does. A block of only padding has an empty range, and pairs
    with no block.

    Args:
      query: tokens of `[B, T]` queries.
      key: tokens of `[B, S]` keys.
      limit: int32 `[1]`, the window.
      queries: queries per block; divides T.
      keys: keys per block; divides S.

    Returns:
      bool `[B, T / queries, S / keys]`.
    """
    query, key = _ranges(query, queries), _ranges(key, keys)
    query = jax.tree.map(lambda x: x[:, :, None], query)  # [B, n, 1]
    key = jax.tree.map(lambda x: x[:, None, :], key)  # [B, 1, m]

    def overlap(x: _Range, y: _Range) -> jax.Array:
        return (x.least <= y.most) & (y.least <= x.most)

    mask = overlap(query.ids, key.ids) & (query.columns.most >= key.columns.least)
    if query.positions is not None:
        mask &= query.positions.least - key.positions.most < limit[0]
    if query.branches is not None:
        mask &= (key.branches.least == 0) | overlap(query.branches, key.branches)
    return mask


def _lists(visible: jax.Array) -> Lists:
    """For each block `[B, n]`, the indices of the blocks that it visits `[B, n, m]`, in order."""
    blocks = jnp.argsort(~visible, axis=-1, stable=True).astype(jnp.int32)
    return Lists(blocks, jnp.sum(visible, axis=-1, dtype=jnp.int32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, query_tokens: Tokens,
    key_tokens: Tokens, limit: jax.Array,
) -> jax.Array:  # fmt: skip
    """Query `[B, T, H, d]`, keys and values `[B, S, K, d]`, whole blocks → as query."""
    return _forward(options, query, key, value, query_tokens, key_tokens, limit)[0]


Residuals = tuple[jax.Array, jax.Array, jax.Array, Tokens, Tokens, jax.Array, jax.Array, jax.Array]
"""The arguments, the output, and float32 `[B, H, T]` of `flash_kernels.forward`."""


# Jitted, so that the kernels are traced and lowered once for all callers.
@functools.partial(jax.jit, static_argnums=0)
def _forward(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, query_tokens: Tokens,
    key_tokens: Tokens, limit: jax.Array,
) -> tuple[jax.Array, Residuals]:  # fmt: skip
    rows, length, heads, _ = query.shape
    tile = options.tiles.forward
    visible = visible_blocks(query_tokens, key_tokens, limit, tile.queries, tile.keys)
    lists, arrays = _lists(visible), (query, key, value)
    out, logz = _call(
        functools.partial(flash_kernels.forward, size=tile.keys, softcap=options.softcap),
        "flash_forward",
        options,
        tile,
        grid=(length // tile.queries, heads, rows),
        in_specs=(
            *_mask_specs(lists, _part(query_tokens, tile.queries), _whole(key_tokens)),
            *_query_specs(tile, *arrays),
        ),
        out_specs=(_heads(tile.queries, query), _scalars(tile.queries)),
        out_shape=(query, jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)),
    )(limit, lists, query_tokens, key_tokens, *arrays)
    return out, (query, key, value, query_tokens, key_tokens, limit, out, logz)


@functools.partial(jax.jit, static_argnums=0)
def _backward(
    options: Options, residuals: Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    query, key, value, query_tokens, key_tokens, limit, out, logz = residuals
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), -1)  # [B, T, H]
    inner = inner.transpose(0, 2, 1)  # [B, H, T]
    masks = (query_tokens, key_tokens, limit)
    arrays = (query, key, value, gradient, logz, inner)
    query_gradient = _to_queries(options, *masks, *arrays)
    return query_gradient, *_to_keys(options, *masks, *arrays), None, None, None


_flash.defvjp(_forward, _backward)


def _to_queries(
    options: Options, query_tokens: Tokens, key_tokens: Tokens, limit: jax.Array,
    *arrays: jax.Array,
) -> jax.Array:  # fmt: skip
    """The gradient of the queries; arrays as `flash_kernels.to_queries` takes them."""
    query = arrays[0]
    rows, length, heads, _ = query.shape
    tile = options.tiles.to_queries
    visible = visible_blocks(query_tokens, key_tokens, limit, tile.queries, tile.keys)
    lists = _lists(visible)
    return _call(
        functools.partial(flash_kernels.to_queries, size=tile.keys, softcap=options.softcap),
        "flash_to_queries",
        options,
        tile,
        grid=(length // tile.queries, heads, rows),
        in_specs=(
            *_mask_specs(lists, _part(query_tokens, tile.queries), _whole(key_tokens)),
            *_query_specs(tile, *arrays[:3]),
            _heads(tile.queries, query),
            *(_scalars(tile.queries),) * 2,
        ),
        out_specs=_heads(tile.queries, query),
        out_shape=query,
    )(limit, lists, query_tokens, key_tokens, *arrays)


def _to_keys(
    options: Options, query_tokens: Tokens, key_tokens: Tokens, limit: jax.Array,
    *arrays: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The gradients of keys and values; arrays as `flash_kernels.to_keys` takes them."""
    query, key = arrays[:2]
    rows, length, heads, width = query.shape
    columns, kv_heads, group = key.shape[1], key.shape[2], heads // key.shape[2]
    tile = options.tiles.to_keys
    visible = visible_blocks(query_tokens, key_tokens, limit, tile.queries, tile.keys)
    lists = _lists(visible.swapaxes(1, 2))
    queries = pl.BlockSpec((None, length, group, width), lambda i, h, b: (b, 0, h, 0))
    scalars = pl.BlockSpec((None, group, length), lambda i, h, b: (b, h, 0))
    keys = _heads(tile.keys, key)
    return _call(
        functools.partial(flash_kernels.to_keys, size=tile.queries, softcap=options.softcap),
        "flash_to_keys",
        options,
        tile,
        grid=(columns // tile.keys, kv_heads, rows),
        in_specs=(
            *_mask_specs(lists, _whole(query_tokens), _part(key_tokens, tile.keys)),
            queries, keys, keys, queries, scalars, scalars,
        ),
        out_specs=(keys, keys),
        out_shape=(key, key),
    )(limit, lists, query_tokens, key_tokens, *arrays)  # fmt: skip


def _call(
    kernel: Any, name: str, options: Options, tile: Tile, *, grid: tuple[int, ...], in_specs: Any,
    out_specs: Any, out_shape: Any,
) -> Any:  # fmt: skip
    """A `pallas_call` of programs (block, head, row); `out_shape` gives arrays of such shapes."""
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), out_shape),
        compiler_params=triton.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=options.interpret,
    )


def _heads(size: int, x: jax.Array) -> pl.BlockSpec:
    """The block spec of one head of `[B, N, H, d]`."""
    return pl.BlockSpec((None, size, None, x.shape[3]), lambda i, h, b: (b, i, h, 0))


def _scalars(size: int) -> pl.BlockSpec:
    """The block spec of one head of `[B, H, N]`."""
    return pl.BlockSpec((None, None, size), lambda i, h, b: (b, h, i))


def _part(tokens: Tokens, size: int) -> Tokens:
    """The block spec of a block of `[B, N]`."""
    return jax.tree.map(lambda _: pl.BlockSpec((None, size), lambda i, h, b: (b, i)), tokens)


def _whole(tokens: Tokens) -> Tokens:
    """The block spec of a row of `[B, N]`."""
    return jax.tree.map(lambda x: pl.BlockSpec((None, x.shape[1]), lambda i, h, b: (b, 0)), tokens)


def _mask_specs(lists: Lists, query_tokens: Tokens, key_tokens: Tokens) -> tuple[Any, ...]:
    """Block specs of the window, a block's list, a row's counts, and tokens."""
    _, n, m = lists.blocks.shape
    one = Lists(
        pl.BlockSpec((None, None, m), lambda i, h, b: (b, i, 0)),
        pl.BlockSpec((None, n), lambda i, h, b: (b, 0)),
    )
    return pl.BlockSpec((1,), lambda i, h, b: (0,)), one, query_tokens, key_tokens


def _query_specs(
    tile: Tile, query: jax.Array, key: jax.Array, value: jax.Array
) -> tuple[pl.BlockSpec, ...]:
    """Block specs of a query block of one head, and of all keys and values that this head reads."""
    group = query.shape[2] // key.shape[2]
    whole = [
        pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda i, h, b: (b, 0, h // group, 0))
        for x in (key, value)
    ]
    return _heads(tile.queries, query), *whole
