"""The attention function: one entrance, and the form in plain XLA that covers every case."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.kernels import cudnn, splash
from jaxalign.models.attention.mask import Lookout, Marks, Sight, visible
from jaxalign.models.backend import backend
from jaxalign.parallel.shard_map import gather_shards, map_shards, pad_length, shard_index
from jaxalign.parallel.sharding import axis_shards
from jaxalign.types import Array

HIDDEN = -1e30
"""Score of what may not be seen; finite, so that a row that sees nothing gives no NaN."""


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Sight | Array,
    scale: jax.Array | float | None = None, softcap: float | None = None, *,
    causal: bool = False, kind: str = "xla",
) -> jax.Array:  # fmt: skip
    """Softmax attention `softmax(scale · q·kᵀ) · v` with grouped key and value heads.

    The backward pass keeps no `[T, S]` matrix: it forms the weights again from the logsumexp of
    each row (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).

    Where the mesh in context splits time, a device attends from its part of every row: it gathers
    the keys and values of the whole row (with grouped heads a fraction of the activations).

    Args:
      query: `[B, T, H, head_dim]`.
      key: `[B, S, K, head_dim]`; each serves H / K query heads.
      value: `[B, S, K, head_dim]`.
      sight: who sees whom; or bool `[B, 1, T, S]`, for "xla" only. A row that sees nothing
        (padding) gets a meaningless finite value.
      scale: of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: they stay.
      causal: the matrix shows no column after a query's own (T = S), so that those need no
        computing. A `Sight` knows that by itself.
      kind: "xla", "splash" or "cudnn", as `jaxalign.models.attention.dispatch` answers.

    Returns:
      `[B, T, H, head_dim]`; the softmax is computed in float32.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query = (query * scale).astype(key.dtype)  # a traced scale is float32
    if not isinstance(sight, Sight):
        lookout = Lookout(Marks(None, None), Marks(None, None), matrix=jnp.asarray(sight))
        return _plain(query, key, value, lookout, Rule(softcap, causal, _parts()))
    if kind == "xla" and axis_shards("length") == 1:
        return _plain(query, key, value, sight.lookout(), Rule(softcap, True, _parts()))
    length = query.shape[1]
    key, value = (_repeated(x, query.shape[2]) for x in (key, value))
    heads = _heads(query, key)
    if kind == "splash":
        return splash(query, key, value, sight, softcap, heads)
    query, key, value = (pad_length(x) for x in (query, key, value))
    marks = jax.tree.map(lambda x: pad_length(jnp.asarray(x)), sight.looking)
    run = _part_of_rows if kind == "xla" else cudnn
    run = functools.partial(run, window=sight.window, softcap=softcap)
    axes = (f"rows length {heads}", *(f"rows length {heads}",) * 2, "rows length", "rows", "new")
    windowed = None if sight.windowed is None else jnp.asarray(sight.windowed)[None]
    out = map_shards(run, (query, key, value, marks, marks, windowed), axes)
    return out[:, :length]


def _repeated(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values with heads repeated, where there are fewer of them than shards of heads."""
    parts, own = axis_shards("heads"), x.shape[2]
    fewer = own % parts and parts % own == 0 and heads % parts == 0
    return jnp.repeat(x, parts // own, axis=2) if fewer else x


def _heads(query: jax.Array, key: jax.Array) -> str:
    """The logical axis of heads where they divide over their shards, else one that is whole."""
    divide = all(x.shape[2] % axis_shards("heads") == 0 for x in (query, key))
    return "heads" if divide else "hidden"


def _part_of_rows(
    query: jax.Array, key: jax.Array, value: jax.Array, looking: Marks, seen: Marks,
    windowed: jax.Array | None, *, window: int | None, softcap: float | None,
) -> jax.Array:  # fmt: skip
    """The plain form on a device that has a part of every row, and marks of the whole of it."""
    key, value = (gather_shards(x, "length", 1) for x in (key, value))
    holds = None if windowed is None else windowed[0]
    lookout = Sight(looking, seen, False, window, holds).lookout()
    lookout = lookout._replace(first=shard_index("length") * query.shape[1])
    return _plain(query, key, value, lookout, Rule(softcap, False, 1))


def _parts() -> int:
    """Over how many devices the scores are split, where the compiler splits them."""
    return axis_shards("rows") * axis_shards("heads")


class Rule(NamedTuple):
    """What of the plain form is settled while tracing.

    Attributes:
      softcap: of the scores, or None.
      causal: columns after a query's own need no computing (T = S).
      parts: over how many devices the scores are split.
    """

    softcap: float | None
    causal: bool
    parts: int


def _plain(
    query: jax.Array, key: jax.Array, value: jax.Array, lookout: Lookout, rule: Rule
) -> jax.Array:
    """Scaled queries `[B, T, H, d]`, keys and values `[B, S, K, d]` → `[B, T, H, d]`."""
    rows, new, heads, width = query.shape
    # The query heads of a group are stacked along the rows of one matrix, so that both products
    # are plain batched matrix products without repeated keys. On CPUs this is about twice as fast
    # as the general contraction of jax.nn.dot_product_attention for narrow heads.
    query = query.reshape(rows, new, key.shape[2], -1, width)
    out = _attend(
        rule,
        query.transpose(0, 2, 3, 1, 4),
        key.transpose(0, 2, 1, 3),
        value.transpose(0, 2, 1, 3),
        lookout,
    )
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, new, heads, width)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    rule: Rule, query: jax.Array, key: jax.Array, value: jax.Array, lookout: Lookout
) -> jax.Array:
    """Query `[B, K, G, T, d]`, key and value `[B, K, S, d]` → as query."""
    return _forward(rule, query, key, value, lookout)[0]


class _Piece(NamedTuple):
    """`count` times `size` queries from `start` on, which see columns before `stop` only."""

    start: int
    count: int
    size: int
    stop: int


def _pieces(rule: Rule, query: jax.Array, key: jax.Array) -> Iterator[_Piece]:
    """How the queries are taken: in blocks with columns of their own, and these in a loop."""
    length, columns = query.shape[3], key.shape[2]
    platform = backend()
    smallest = platform.attention_query_block
    block = length
    if rule.causal and length == columns and length >= 2 * smallest:
        block = -(-length // (platform.attention_query_blocks * smallest)) * smallest
    for start in range(0, length, block):
        end = min(start + block, length)
        stop = end if block < length else columns
        each = query.shape[0] * query.shape[1] * query.shape[2] * stop
        least = smallest if stop <= platform.attention_long_row else smallest // 4
        fit = platform.attention_scores * rule.parts // each // least * least
        size = min(end - start, max(least, fit))
        count = (end - start) // size
        yield _Piece(start, count, size, stop)
        if start + count * size < end:
            yield _Piece(start + count * size, 1, end - start - count * size, stop)


def _forward(rule: Rule, query, key, value, lookout: Lookout):
    outs, logzs = [], []
    pieces = list(_pieces(rule, query, key))
    query, lookout = _tied(pieces, query, lookout)
    for piece in pieces:
        keys, values = key[:, :, : piece.stop], value[:, :, : piece.stop]

        def one(start, piece=piece, keys=keys, values=values):
            part = jax.lax.dynamic_slice_in_dim(query, start, piece.size, axis=3)
            sees = visible(lookout, start, piece.size, piece.stop)
            scores, _ = _scores(rule.softcap, part, keys, sees)
            top = jnp.max(scores, axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = jnp.sum(weights, axis=-1, keepdims=True)
            out = _matmul(weights.astype(values.dtype), values)
            return (out / total).astype(query.dtype), top + jnp.log(total)

        if piece.count == 1:
            out, logz = one(piece.start)
        else:
            starts = piece.start + piece.size * jnp.arange(piece.count)
            out, logz = (_joined(x) for x in jax.lax.map(one, starts))
        outs.append(out)
        logzs.append(logz)
    out, logz = (x[0] if len(x) == 1 else jnp.concatenate(x, axis=3) for x in (outs, logzs))
    return out, (query, key, value, lookout, out, logz)


def _tied(pieces: list[_Piece], query: jax.Array, lookout: Lookout) -> tuple[jax.Array, Lookout]:
    """Ties who sees whom to the queries where there are loops.

    It depends on no parameter; left free, JAX would move it out of the loops (when it splits what a
    gradient needs from what it does not) and so make the whole `[T, T]` mask after all.
    """
    if all(piece.count == 1 for piece in pieces):
        return query, lookout
    if lookout.first is None:
        lookout = lookout._replace(first=jnp.zeros((), jnp.int32))
    return jax.lax.optimization_barrier((query, lookout))


def _joined(x: jax.Array) -> jax.Array:
    """`[n, B, K, G, t, d]` → `[B, K, G, n · t, d]`."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[-1])


def _backward(rule: Rule, saved, gradient):
    query, key, value, lookout, out, logz = saved
    # Σ_s p_s · (∂L/∂p_s) of each query, without the weights.
    inner = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), -1, keepdims=True)
    to_queries = []
    to_key, to_value = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    pieces = list(_pieces(rule, query, key))
    query, lookout = _tied(pieces, query, lookout)
    if all(piece.count == 1 for piece in pieces):
        # Where layers are not in a loop the compiler sees both passes at once, and would keep the
        # weights of the first rather than form them again.
        query, key = jax.lax.optimization_barrier((query, key))
    for piece in pieces:
        keys, values = key[:, :, : piece.stop], value[:, :, : piece.stop]

        def one(start, piece=piece, keys=keys, values=values):
            part, above, part_logz, part_inner = (
                jax.lax.dynamic_slice_in_dim(x, start, piece.size, axis=3)
                for x in (query, gradient, logz, inner)
            )
            sees = visible(lookout, start, piece.size, piece.stop)
            scores, slope = _scores(rule.softcap, part, keys, sees)
            weights = jnp.exp(scores - part_logz)
            to_scores = weights * (_matmul(above, values.swapaxes(-1, -2)) - part_inner)
            if slope is not None:
                to_scores = to_scores * slope
            weights, to_scores = weights.astype(query.dtype), to_scores.astype(query.dtype)
            sums = (_columns(part, to_scores), _columns(above, weights))
            return sums, _matmul(to_scores, keys).astype(query.dtype)

        if piece.count == 1:
            sums, to_query = one(piece.start)
        else:
            starts = piece.start + piece.size * jnp.arange(piece.count)
            zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (keys, values))
            sums, to_query = jax.lax.scan(functools.partial(_add, one), zeros, starts)
            to_query = _joined(to_query)
        to_key = to_key.at[:, :, : piece.stop].add(sums[0])
        to_value = to_value.at[:, :, : piece.stop].add(sums[1])
        to_queries.append(to_query)
    joined = to_queries[0] if len(to_queries) == 1 else jnp.concatenate(to_queries, axis=3)
    return joined, to_key.astype(key.dtype), to_value.astype(value.dtype), None


def _add(one, sums, start):
    new, other = one(start)
    return jax.tree.map(jnp.add, sums, new), other


_attend.defvjp(_forward, _backward)


def _scores(
    softcap: float | None, query: jax.Array, key: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    """Masked scores `[B, K, G, T, S]` in float32, and the slope of the soft-cap where there is."""
    scores = _matmul(query, key.swapaxes(-1, -2))
    slope = None
    if softcap is not None:
        bent = jnp.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    return jnp.where(mask[:, :, None], scores, HIDDEN), slope


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """`[B, K, G, T, n]` by `[B, K, n, m]`, the G·T rows as one matrix; float32."""
    out = jnp.matmul(
        x.reshape(*x.shape[:2], -1, x.shape[-1]), y, preferred_element_type=jnp.float32
    )
    return out.reshape(*x.shape[:-1], y.shape[-1])


def _columns(x: jax.Array, y: jax.Array) -> jax.Array:
    """Σ over G and T of y ⊗ x: `[B, K, G, T, d]`, `[B, K, G, T, S]` → `[B, K, S, d]`.

    Written as (xᵀ·y)ᵀ, so that the narrow operand is the one to be transposed.
    """
    flat = (z.reshape(*z.shape[:2], -1, z.shape[-1]) for z in (x, y))
    narrow, wide = flat
    out = jnp.matmul(narrow.swapaxes(-1, -2), wide, preferred_element_type=jnp.float32)
    return out.swapaxes(-1, -2)
