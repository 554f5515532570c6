"""Attention in plain XLA: blocks of queries against unmasked keys, forward and backward.

The backward pass keeps no `[T, S]` matrix: it recomputes the weights from the logsumexp of each row
(Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.mask import MaskSpec, make_mask
from jaxalign.models.backend import backend

MASKED_SCORE = -1e30
"""Score of a masked key; finite, so that a query without any key gives no NaN."""


class XLAOptions(NamedTuple):
    """Static options of XLA attention.

    Attributes:
      softcap: the soft cap of the scores, or None.
      causal: no query attends to a later column (T = S), so that blocks skip later keys.
      score_shards: the number of devices over which the compiler splits the scores.
      wide: outputs and gradients are float32, to be added to others before rounding.
    """

    softcap: float | None
    causal: bool
    score_shards: int
    wide: bool = False


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec, options: XLAOptions
) -> jax.Array:
    """Scaled queries `[B, T, H, d]`, keys and values `[B, S, K, d]` → `[B, T, H, d]`."""
    rows, length, heads, width = query.shape
    # The G = H / K query heads of a group become rows of one matrix, so that both products are
    # plain batched matrix products without repeated keys. For narrow heads this is about twice as
    # fast on CPUs as the general contraction of jax.nn.dot_product_attention.
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
    return forward(options, query, key, value, mask)[0]


class QueryBlocks(NamedTuple):
    """`count` blocks of `size` queries from `start` on; none attends to a key from `stop` on."""

    start: int
    count: int
    size: int
    stop: int


def block_schedule(options: XLAOptions, query: jax.Array, key: jax.Array) -> Iterator[QueryBlocks]:
    """How queries are split into blocks.

    With a causal mask, up to `Backend.attention_query_blocks` spans of queries each have their own
    range of key columns, so that products above the diagonal are skipped. A span with more than
    `Backend.attention_scores` scores per device is split further, and its blocks run in a loop.
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


def forward(
    options: XLAOptions, query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec
) -> tuple[jax.Array, Residuals]:
    """The output `[B, K, G, T, d]`, and the residuals for `backward`."""
    dtype = jnp.float32 if options.wide else query.dtype
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
            return (out / total).astype(dtype), top + jnp.log(total)

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
    """Makes the mask depend on the queries if blocks run in a loop.

    The mask depends on no parameter. So partial evaluation for the gradient would move it out of
    the loop, and materialise all of `[T, T]`.
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


def backward(
    options: XLAOptions, residuals: Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of query, key and value.

    `out` and `logz` of the residuals may cover more keys than these: the gradients are then the
    contribution of these keys and values.
    """
    query, key, value, mask, out, logz = residuals
    dtypes = [jnp.dtype(jnp.float32) if options.wide else x.dtype for x in (query, key, value)]
    # Σ_s p_s · ∂L/∂p_s of each query, without the weights p: [B, K, G, T, 1].
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    query_gradients = []
    key_gradient, value_gradient = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    schedule = list(block_schedule(options, query, key))
    query, mask = _keep_mask_in_loops(schedule, query, mask)
    if all(blocks.count == 1 for blocks in schedule):
        # If layers are unrolled, the compiler sees both passes at once. Without this barrier it
        # would keep the weights of the forward pass instead of recomputing them.
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
            return sums, _matmul(to_scores, keys).astype(dtypes[0])

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
    return joined, key_gradient.astype(dtypes[1]), value_gradient.astype(dtypes[2]), None


_Sums = tuple[jax.Array, jax.Array]


def _add_block(
    block_gradients: Callable[[jax.Array], tuple[_Sums, jax.Array]], sums: _Sums, start: jax.Array
) -> tuple[_Sums, jax.Array]:
    """A step of the scan over blocks: accumulates the gradients of keys and values."""
    new, query_gradient = block_gradients(start)
    return jax.tree.map(jnp.add, sums, new), query_gradient


_attend.defvjp(forward, backward)


def _scores(
    softcap: float | None, query: jax.Array, key: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores `[B, K, G, T, S]` in float32, and the soft cap's derivative if there is one."""
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

    It is computed as (xᵀ·y)ᵀ, so that the narrow operand is transposed.
    """
    narrow, wide = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))  # [B, K, G·T, …]
    out = jnp.matmul(narrow.swapaxes(-1, -2), wide, preferred_element_type=jnp.float32)
    return out.swapaxes(-1, -2)
