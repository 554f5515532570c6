"""The attention function: one entrance, and the form in plain XLA that covers every case."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.dispatch import has_triton, no_mesh
from jaxalign.models.attention.kernels import cudnn, splash
from jaxalign.models.attention.mask import MaskSpec, Segments, make_mask
from jaxalign.models.backend import backend
from jaxalign.parallel.shard_map import gather_shards, map_shards, pad_length, shard_index
from jaxalign.parallel.sharding import axis_shards
from jaxalign.types import Array

MASKED_SCORE = -1e30
"""Score of a masked key; finite, so that a query without any key gives no NaN."""


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec | Array,
    scale: jax.Array | float | None = None, softcap: float | None = None, *,
    causal: bool = False, kind: str = "xla",
) -> jax.Array:  # fmt: skip
    """Softmax attention with grouped key and value heads.

        softmax(scale · q·kᵀ) · v

    The backward pass keeps no `[T, S]` matrix: it forms the weights again from the logsumexp of
    each row (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).

    Where the mesh in context splits the length, each device attends from its part of every row. It
    all-gathers the keys and values of the whole row; with grouped heads these are a fraction of the
    activations.

    Args:
      query: `[B, T, H, head_dim]`.
      key: `[B, S, K, head_dim]`; each serves H / K query heads.
      value: `[B, S, K, head_dim]`.
      mask: which query attends to which key; or bool `[B, 1, T, S]`, for "xla" only. A query
        without keys (padding) gets a meaningless finite value.
      scale: of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: they stay.
      causal: with a bool matrix: it is False right of the diagonal (T = S), so that those products
        are skipped. A `MaskSpec` implies it.
      kind: "xla", "splash", "cudnn" or "pallas", see `jaxalign.models.attention.dispatch`.

    Returns:
      `[B, T, H, head_dim]`; the softmax is computed in float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = (query * scale).astype(key.dtype)  # a traced scale is float32
    if not isinstance(mask, MaskSpec):
        options = XLAOptions(softcap, causal, _score_shards())
        return xla_attention(query, key, value, MaskSpec(matrix=jnp.asarray(mask)), options)
    if kind == "xla" and axis_shards("length") == 1:
        return xla_attention(query, key, value, mask, XLAOptions(softcap, True, _score_shards()))
    if mask.query is None:
        raise ValueError(f"attention={kind!r} wants segments, not a matrix alone")
    length = query.shape[1]
    key, value = (_repeat_heads(x, query.shape[2]) for x in (key, value))
    heads = _head_axis(query, key)
    if kind == "splash":
        return splash(query, key, value, mask, softcap, heads)
    query, key, value = (pad_length(x) for x in (query, key, value))
    segments = jax.tree.map(lambda x: pad_length(jnp.asarray(x)), mask.query)
    run = functools.partial(_form(kind, mask.zigzag), window=mask.window, softcap=softcap)
    # Query, key and value are split along rows, length and heads. Segments go in twice: those of
    # the device's queries, and those of the whole rows.
    split = f"rows length {heads}"
    axes = (split, split, split, "rows length", "rows", "new")
    windowed = None if mask.windowed is None else jnp.asarray(mask.windowed)[None]
    out = map_shards(run, (query, key, value, segments, segments, windowed), axes)
    return out[:, :length]


def _form(kind: str, zigzag: bool) -> Callable[..., jax.Array]:
    """What `map_shards` runs for a kind of attention."""
    if kind == "xla":
        return blockwise
    # Without a mesh, nothing splits a Pallas kernel over several devices.
    if kind == "cudnn" and (no_mesh() or not has_triton()):
        return functools.partial(cudnn, packed=blockwise)
    from jaxalign.models.attention.flash import flash

    form = functools.partial(flash, zigzag=zigzag)
    return form if kind == "pallas" else functools.partial(cudnn, packed=form)


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values with heads repeated, where there are fewer of them than shards of heads."""
    shards, kv_heads = axis_shards("heads"), x.shape[2]
    fewer = kv_heads % shards and shards % kv_heads == 0 and heads % shards == 0
    return jnp.repeat(x, shards // kv_heads, axis=2) if fewer else x


def _head_axis(query: jax.Array, key: jax.Array) -> str:
    """The logical axis of heads where their shards divide them, else one that is never split."""
    divide = all(x.shape[2] % axis_shards("heads") == 0 for x in (query, key))
    return "heads" if divide else "hidden"


def blockwise(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: Segments,
    key_segments: Segments, windowed: jax.Array | None, *, window: int | None,
    softcap: float | None,
) -> jax.Array:  # fmt: skip
    """XLA attention on one device, which may hold a part of every row; `map_shards` runs it.

    Args:
      query: `[B, T / n, H, d]`, scaled.
      key: `[B, T / n, K, d]`.
      value: `[B, T / n, K, d]`.
      query_segments: of this device's queries.
      key_segments: of the whole rows.
      windowed: bool `[1]`, whether the window holds; None: it does.
      window: how many positions a query attends to, its own included.
      softcap: of the scores, or None.

    Returns:
      `[B, T / n, H, d]`.
    """
    key, value = (gather_shards(x, "length", 1) for x in (key, value))  # [B, T, K, d]
    holds = None if windowed is None else windowed[0]
    start = shard_index("length") * query.shape[1]
    mask = MaskSpec(query_segments, key_segments, False, window, holds, start)
    causal = axis_shards("length") == 1
    return xla_attention(query, key, value, mask, XLAOptions(softcap, causal, 1))


def _score_shards() -> int:
    """Over how many devices the compiler splits the scores."""
    return axis_shards("rows") * axis_shards("heads")


class XLAOptions(NamedTuple):
    """Static options of XLA attention.

    Attributes:
      softcap: of the scores, or None.
      causal: no query attends to a later column (T = S), so that blocks skip later keys.
      score_shards: over how many devices the compiler splits the scores.
    """

    softcap: float | None
    causal: bool
    score_shards: int


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec, options: XLAOptions
) -> jax.Array:
    """Scaled queries `[B, T, H, d]`, keys and values `[B, S, K, d]` → `[B, T, H, d]`."""
    rows, length, heads, width = query.shape
    # The G = H / K query heads of a group become rows of one matrix, so that both products are
    # plain batched matrix products without repeated keys. On CPUs this is about twice as fast as
    # the general contraction of jax.nn.dot_product_attention for narrow heads.
    query = query.reshape(rows, length, key.shape[2], -1, width)  # [B, T, K, G, d]
    out = _attend(
        options,
        query.transpose(0, 2, 3, 1, 4),  # [B, K, G, T, d]
        key.transpose(0, 2, 1, 3),  # [B, K, S, d]
        value.transpose(0, 2, 1, 3),  # [B, K, S, d]
        mask,
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, length, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    options: XLAOptions, query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec
) -> jax.Array:
    """Query `[B, K, G, T, d]`, key and value `[B, K, S, d]` → as query."""
    return _forward(options, query, key, value, mask)[0]


class QueryBlocks(NamedTuple):
    """`count` blocks of `size` queries from `start` on; none attends to a key from `stop` on."""

    start: int
    count: int
    size: int
    stop: int


def block_schedule(options: XLAOptions, query: jax.Array, key: jax.Array) -> Iterator[QueryBlocks]:
    """How queries are cut into blocks.

    Under a causal mask, up to `Backend.attention_query_blocks` spans of queries have key columns of
    their own, so that products above the diagonal are skipped. A span whose scores are more than
    `Backend.attention_scores` a device is cut further, and its blocks run in a loop.
    """
    platform = backend()
    smallest = platform.attention_query_block
    length, columns = query.shape[3], key.shape[2]
    span = length
    if options.causal and length == columns and length >= 2 * smallest:
        span = -(-length // (platform.attention_query_blocks * smallest)) * smallest
    for start in range(0, length, span):
        end = min(start + span, length)
        stop = end if span < length else columns
        scores = query.shape[0] * query.shape[1] * query.shape[2] * stop  # of one query position
        least = smallest if stop <= platform.attention_long_row else smallest // 4
        fit = platform.attention_scores * options.score_shards // scores // least * least
        size = min(end - start, max(least, fit))
        count = (end - start) // size
        yield QueryBlocks(start, count, size, stop)
        if start + count * size < end:
            yield QueryBlocks(start + count * size, 1, end - start - count * size, stop)


Residuals = tuple[jax.Array, jax.Array, jax.Array, MaskSpec, jax.Array, jax.Array]
"""Query, key, value, mask, output `[B, K, G, T, d]` and logsumexp `[B, K, G, T, 1]`."""


def _forward(
    options: XLAOptions, query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec
) -> tuple[jax.Array, Residuals]:
    outs, logzs = [], []
    schedule = list(block_schedule(options, query, key))
    query, mask = _keep_mask_in_loops(schedule, query, mask)
    for blocks in schedule:
        keys, values = key[:, :, : blocks.stop], value[:, :, : blocks.stop]  # [B, K, stop, d]

        def attend_block(
            start: jax.Array | int,
            blocks: QueryBlocks = blocks,
            keys: jax.Array = keys,
            values: jax.Array = values,
        ) -> tuple[jax.Array, jax.Array]:
            part = jax.lax.dynamic_slice_in_dim(query, start, blocks.size, axis=3)
            part_mask = make_mask(mask, start, blocks.size, blocks.stop)  # [B, 1, size, stop]
            scores, _ = _scores(options.softcap, part, keys, part_mask)  # [B, K, G, size, stop]
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)  # [B, K, G, size, 1]
            out = _matmul(weights.astype(values.dtype), values)  # [B, K, G, size, d]
            return (out / total).astype(query.dtype), top + jnp.log(total)

        if blocks.count == 1:
            out, logz = attend_block(blocks.start)
        else:
            starts = blocks.start + blocks.size * jnp.arange(blocks.count)
            out, logz = (_join_blocks(x) for x in jax.lax.map(attend_block, starts))
        outs.append(out)
        logzs.append(logz)
    out, logz = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=3) for x in (outs, logzs))
    return out, (query, key, value, mask, out, logz)


def _keep_mask_in_loops(
    schedule: list[QueryBlocks], query: jax.Array, mask: MaskSpec
) -> tuple[jax.Array, MaskSpec]:
    """Makes the mask depend on the queries where blocks run in a loop.

    The mask depends on no parameter. When JAX splits what a gradient needs from what it does not,
    it would move the mask out of the loop, and so make all of `[T, T]`.
    """
    if all(blocks.count == 1 for blocks in schedule):
        return query, mask
    if mask.query_start is None:
        mask = dataclasses.replace(mask, query_start=jnp.zeros((), jnp.int32))
    return jax.lax.optimization_barrier((query, mask))


def _join_blocks(x: jax.Array) -> jax.Array:
    """`[n, B, K, G, t, d]` → `[B, K, G, n · t, d]`."""
    x = jnp.moveaxis(x, 0, 3)  # [B, K, G, n, t, d]
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _backward(
    options: XLAOptions, residuals: Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    query, key, value, mask, out, logz = residuals
    # Σ_s p_s · ∂L/∂p_s of each query, without the weights p: [B, K, G, T, 1].
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    query_gradients = []
    key_gradient, value_gradient = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    schedule = list(block_schedule(options, query, key))
    query, mask = _keep_mask_in_loops(schedule, query, mask)
    if all(blocks.count == 1 for blocks in schedule):
        # Where layers are unrolled the compiler sees both passes at once. Without this barrier it
        # would keep the weights of the forward pass rather than form them again.
        query, key = jax.lax.optimization_barrier((query, key))
    for blocks in schedule:
        keys, values = key[:, :, : blocks.stop], value[:, :, : blocks.stop]  # [B, K, stop, d]

        def block_gradients(
            start: jax.Array | int,
            blocks: QueryBlocks = blocks,
            keys: jax.Array = keys,
            values: jax.Array = values,
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            part, above, part_logz, part_inner = (
                jax.lax.dynamic_slice_in_dim(x, start, blocks.size, axis=3)
                for x in (query, gradient, logz, inner)
            )
            part_mask = make_mask(mask, start, blocks.size, blocks.stop)  # [B, 1, size, stop]
            scores, slope = _scores(options.softcap, part, keys, part_mask)
            weights = jnp.exp(scores - part_logz)  # [B, K, G, size, stop]
            to_scores = weights * (_matmul(above, values.swapaxes(-1, -2)) - part_inner)
            if slope is not None:
                to_scores = to_scores * slope
            weights, to_scores = weights.astype(query.dtype), to_scores.astype(query.dtype)
            # To keys and values, [B, K, stop, d]; to the queries of the block, [B, K, G, size, d].
            sums = (_sum_over_queries(part, to_scores), _sum_over_queries(above, weights))
            return sums, _matmul(to_scores, keys).astype(query.dtype)

        if blocks.count == 1:
            sums, query_gradient = block_gradients(blocks.start)
        else:
            starts = blocks.start + blocks.size * jnp.arange(blocks.count)
            zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
            add = functools.partial(_add_block, block_gradients)
            sums, query_gradient = jax.lax.scan(add, zeros, starts)
            query_gradient = _join_blocks(query_gradient)
        key_gradient = key_gradient.at[:, :, : blocks.stop].add(sums[0])
        value_gradient = value_gradient.at[:, :, : blocks.stop].add(sums[1])
        query_gradients.append(query_gradient)
    joined = query_gradients[0]
    if len(query_gradients) > 1:
        joined = jnp.concatenate(query_gradients, axis=3)
    return joined, key_gradient.astype(key.dtype), value_gradient.astype(value.dtype), None


_Sums = tuple[jax.Array, jax.Array]


def _add_block(
    block_gradients: Callable[[jax.Array], tuple[_Sums, jax.Array]], sums: _Sums, start: jax.Array
) -> tuple[_Sums, jax.Array]:
    """A step of the scan over blocks: adds up gradients of keys and values."""
    new, query_gradient = block_gradients(start)
    return jax.tree.map(jnp.add, sums, new), query_gradient


_attend.defvjp(_forward, _backward)


def _scores(
    softcap: float | None, query: jax.Array, key: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores `[B, K, G, T, S]` in float32, and the slope of the soft cap if there is one."""
    scores = _matmul(query, key.swapaxes(-1, -2))  # [B, K, G, T, d] · [B, K, d, S]
    slope = None
    if softcap is not None:
        capped = jnp.tanh(scores / softcap)
        scores, slope = softcap * capped, 1 - capped * capped
    return jnp.where(mask[:, :, None], scores, MASKED_SCORE), slope  # mask: [B, 1, 1, T, S]


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[B, K, G, T, n]` by `[B, K, n, m]` → `[B, K, G, T, m]`, float32; G·T rows in one matrix."""
    out = jnp.matmul(
        x.reshape(*x.shape[:2], -1, x.shape[-1]), y, preferred_element_type=jnp.float32
    )
    return out.reshape(*x.shape[:-1], y.shape[-1])


def _sum_over_queries(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ over G and T of y ⊗ x: `[B, K, G, T, d]`, `[B, K, G, T, S]` → `[B, K, S, d]`.

    Written as (xᵀ·y)ᵀ, so that the narrow operand is the one to be transposed.
    """
    narrow, wide = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))  # [B, K, G·T, …]
    out = jnp.matmul(narrow.swapaxes(-1, -2), wide, preferred_element_type=jnp.float32)
    return out.swapaxes(-1, -2)
