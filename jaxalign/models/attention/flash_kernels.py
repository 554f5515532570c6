"""The three Pallas kernels of flash attention for GPUs: forward, and both halves of backward.

Each program of a grid holds one block of queries, or of keys, and visits the listed blocks of the
other side. Products take the inputs' dtype and accumulate in float32, as does the softmax (Dao
2023, https://arxiv.org/abs/2307.08691, algorithms 1 and 2).

With scaled scores s, capped to c·tanh(s/c) if there is a cap, weights p of the unmasked keys and
incoming gradients g of the outputs o,

    v' = pᵀ·g,      s' = p·(g·vᵀ − Σ g·o)·(1 − tanh²(s/c)),      q' = s'·k,      k' = s'ᵀ·q.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

HIDDEN = -1e30
"""The score of a masked key; finite, so that rows without keys give no NaN."""

_LOG2_E = math.log2(math.e)


class Tokens(NamedTuple):
    """The integers of each token that the mask reads; int32 `[B, N]`, or a block of one row.

    Attributes:
      columns: the column in the whole row, from 0.
      ids: the segment. Padding is -1 among the queries and 0 among the keys, so that they never
        match.
      positions: the position in its document, or None without a window.
      branches: the branch, or None.
    """

    columns: Any
    ids: Any
    positions: Any = None
    branches: Any = None


class Lists(NamedTuple):
    """Which of the m blocks of the other side each of n blocks visits.

    Attributes:
      blocks: int32 `[B, n, m]`, block indices; the blocks to visit come first.
      count: int32 `[B, n]`, how many blocks to visit.
    """

    blocks: Any
    count: Any


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def _read(tokens: Tokens, at: Any) -> Tokens:
    return jax.tree.map(lambda ref: ref[at], tokens)


def _visible(query: Tokens, key: Tokens, limit: jax.Array, axis: int) -> jax.Array:
    """The mask of a block, with queries along `axis` and keys along the other."""
    query = jax.tree.map(lambda x: jnp.expand_dims(x, 1 - axis), query)
    key = jax.tree.map(lambda x: jnp.expand_dims(x, axis), key)
    mask = (query.ids == key.ids) & (query.columns >= key.columns)
    if query.positions is not None:
        mask &= query.positions - key.positions < limit
    if query.branches is not None:
        mask &= (key.branches == 0) | (key.branches == query.branches)
    return mask


def _cap(scores: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Capped scores, and the cap's derivative if there is one."""
    if softcap is None:
        return scores, None
    capped = jnp.tanh(scores / softcap)
    return softcap * capped, 1 - capped * capped


def forward(
    limit: Any, lists: Lists, query_tokens: Tokens, key_tokens: Tokens, query: Any, key: Any,
    value: Any, out: Any, logz: Any, *, size: int, softcap: float | None,
) -> None:  # fmt: skip
    """One block of queries of one head.

    Args:
      limit: int32 `[1]`, the window.
      lists: key blocks to visit: `[m]` of this block, and the counts `[n]` of all.
      query_tokens: `[t]`.
      key_tokens: `[S]`.
      query: `[t, d]`.
      key: `[S, d]`.
      value: `[S, d]`.
      out: `[t, d]`, the output to write.
      logz: float32 `[t]`, the second output to write: the base-2 logarithm of Σ exp(s).
      size: keys per block.
      softcap: the soft cap of the scores, or None.
    """
    queries, tokens = query[...], _read(query_tokens, ...)

    def step(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        total, top, weight = sums
        at = pl.ds(lists.blocks[i] * size, size)
        scores, _ = _cap(_dot(queries, key[at, :], (1, 1)), softcap)  # [t, size]
        mask = _visible(tokens, _read(key_tokens, at), limit[0], 0)
        scores = jnp.where(mask, scores * _LOG2_E, HIDDEN)
        new_top = jnp.maximum(top, jnp.max(scores, axis=1))
        # While a query has no unmasked key yet, every weight is 2^(HIDDEN − 0) = 0.
        base = jnp.where(new_top > HIDDEN, new_top, 0.0)
        weights = jnp.exp2(scores - base[:, None])
        shrink = jnp.exp2(top - base)
        total = total * shrink[:, None] + _dot(weights.astype(value.dtype), value[at, :], (1, 0))
        return total, new_top, weight * shrink + jnp.sum(weights, axis=1)

    start = (
        jnp.zeros(queries.shape, jnp.float32),
        jnp.full(queries.shape[:1], HIDDEN, jnp.float32),
        jnp.zeros(queries.shape[:1], jnp.float32),
    )
    total, top, weight = jax.lax.fori_loop(0, lists.count[pl.program_id(0)], step, start)
    weight = jnp.where(weight > 0, weight, 1.0)
    out[...] = (total / weight[:, None]).astype(out.dtype)
    logz[...] = jnp.where(top > HIDDEN, top, 0.0) + jnp.log2(weight)


def to_queries(
    limit: Any, lists: Lists, query_tokens: Tokens, key_tokens: Tokens, query: Any, key: Any,
    value: Any, above: Any, logz: Any, inner: Any, out: Any, *, size: int, softcap: float | None,
) -> None:  # fmt: skip
    """The gradient of one block of queries of one head.

    Args:
      limit, lists, query_tokens, key_tokens, query, key, value, size, softcap: as for `forward`.
      above: g, `[t, d]`.
      logz: of `forward`, `[t]`.
      inner: float32 `[t]`, Σ g·o.
      out: `[t, d]`, the output to write.
    """
    queries, gradient, tokens = query[...], above[...], _read(query_tokens, ...)
    base, less = logz[...], inner[...]

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        at = pl.ds(lists.blocks[i] * size, size)
        keys = key[at, :]
        scores, slope = _cap(_dot(queries, keys, (1, 1)), softcap)  # [t, size]
        mask = _visible(tokens, _read(key_tokens, at), limit[0], 0)
        weights = jnp.exp2(jnp.where(mask, scores * _LOG2_E, HIDDEN) - base[:, None])
        to_scores = weights * (_dot(gradient, value[at, :], (1, 1)) - less[:, None])
        if slope is not None:
            to_scores *= slope
        return total + _dot(to_scores.astype(keys.dtype), keys, (1, 0))

    zeros = jnp.zeros(queries.shape, jnp.float32)
    total = jax.lax.fori_loop(0, lists.count[pl.program_id(0)], step, zeros)
    out[...] = total.astype(out.dtype)


def to_keys(
    limit: Any, lists: Lists, query_tokens: Tokens, key_tokens: Tokens, query: Any, key: Any,
    value: Any, above: Any, logz: Any, inner: Any, key_out: Any, value_out: Any, *, size: int,
    softcap: float | None,
) -> None:  # fmt: skip
    """The gradients of one block of keys and values of one head, from all G heads that read it.

    Args:
      limit, softcap: as for `forward`.
      lists: query blocks to visit: `[m]` of this block, and the counts `[n]` of all.
      query_tokens: `[T]`.
      key_tokens: `[s]`.
      query: `[T, G, d]`.
      key: `[s, d]`.
      value: `[s, d]`.
      above: g, `[T, G, d]`.
      logz: of `forward`, `[G, T]`.
      inner: float32 `[G, T]`, Σ g·o.
      key_out: `[s, d]`, an output to write.
      value_out: `[s, d]`, an output to write.
      size: queries per block.
    """
    keys, values, tokens = key[...], value[...], _read(key_tokens, ...)
    count = lists.count[pl.program_id(0)]

    def head(g: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            to_key, to_value = sums
            at = pl.ds(lists.blocks[i] * size, size)
            queries, gradient = query[at, g, :], above[at, g, :]
            # With keys along the rows, neither product needs a transposed left side.
            scores, slope = _cap(_dot(keys, queries, (1, 1)), softcap)  # [s, size]
            mask = _visible(_read(query_tokens, at), tokens, limit[0], 1)
            weights = jnp.where(mask, scores * _LOG2_E, HIDDEN) - logz[g, at][None, :]
            weights = jnp.exp2(weights)
            to_value += _dot(weights.astype(gradient.dtype), gradient, (1, 0))
            to_scores = weights * (_dot(values, gradient, (1, 1)) - inner[g, at][None, :])
            if slope is not None:
                to_scores *= slope
            return to_key + _dot(to_scores.astype(queries.dtype), queries, (1, 0)), to_value

        return jax.lax.fori_loop(0, count, step, sums)

    zeros = jnp.zeros(keys.shape, jnp.float32)
    to_key, to_value = jax.lax.fori_loop(0, query.shape[1], head, (zeros, zeros))
    key_out[...] = to_key.astype(key_out.dtype)
    value_out[...] = to_value.astype(value_out.dtype)
