"""The attention function: one entry point to every kind, on one or several devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.models.attention import ring_xla
from jaxalign.models.attention.dispatch import has_triton, no_mesh
from jaxalign.models.attention.kernels import cudnn, splash
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.attention.ring import ring
from jaxalign.models.attention.xla_blocks import XLAOptions, xla_attention
from jaxalign.parallel.rules import use_rules
from jaxalign.parallel.shard_map import (
    axis_names,
    gather_shards,
    map_shards,
    move_split,
    pad_length,
    shard_index,
)
from jaxalign.parallel.sharding import axis_shards
from jaxalign.types import Array


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec | Array,
    scale: jax.Array | float | None = None, softcap: float | None = None, *,
    causal: bool = False, kind: str = "xla",
) -> jax.Array:  # fmt: skip
    """Softmax attention with grouped key and value heads.

        softmax(scale · q·kᵀ) · v

    The backward pass keeps no `[T, S]` matrix: it forms the weights again from the logsumexp of
    each row (Dao et al. 2022, https://arxiv.org/abs/2205.14135, algorithm 4).

    If the mesh in context splits the length, each device attends from its part of every row to the
    keys and values of the whole row; `mask.exchange` determines how it gets them.

    Args:
      query: `[B, T, H, head_dim]`.
      key: `[B, S, K, head_dim]`; each serves H / K query heads.
      value: `[B, S, K, head_dim]`.
      mask: which query attends to which key; or bool `[B, 1, T, S]`, for "xla" only. A query
        without keys (padding) gets a meaningless finite value.
      scale: the factor of the scores; None: 1/√head_dim. May be traced.
      softcap: c: scores become `c · tanh(scores / c)` before the mask; None: no cap.
      causal: for a bool matrix: promises that it is False right of the diagonal (T = S), so that
        those products are skipped. A `MaskSpec` implies it.
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
    if mask.exchange == "ulysses" and axis_shards("length") > 1:
        return _attend_by_heads(query, key, value, mask, softcap, kind)
    return _attend_by_shards(query, key, value, mask, softcap, kind)


def _attend_by_shards(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec, softcap: float | None,
    kind: str,
) -> jax.Array:  # fmt: skip
    """Runs attention on each device for its rows, heads and part of the length."""
    length = query.shape[1]
    key, value = (_repeat_heads(x, query.shape[2]) for x in (key, value))
    heads = _head_axis(query, key)
    circular = mask.exchange == "ring" and axis_shards("length") > 1
    if kind == "splash" and not circular:
        return splash(query, key, value, mask, softcap, heads)
    query, key, value = (pad_length(x) for x in (query, key, value))
    segments = jax.tree.map(lambda x: pad_length(jnp.asarray(x)), mask.query)
    form = _form(kind, mask.zigzag)
    if circular:  # the kernels cannot return a partial softmax
        form = functools.partial(ring, form=ring_xla.FORM, zigzag=mask.zigzag)
    run = functools.partial(form, window=mask.window, softcap=softcap)
    # Query, key and value are split along rows, length and heads. Segments are passed twice: for
    # the device's queries, and for the whole rows.
    split = f"rows length {heads}"
    axes = (split, split, split, "rows length", "rows", "new")
    windowed = None if mask.windowed is None else jnp.asarray(mask.windowed)[None]
    out = map_shards(run, (query, key, value, segments, segments, windowed), axes)
    return out[:, :length]


def _attend_by_heads(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec, softcap: float | None,
    kind: str,
) -> jax.Array:  # fmt: skip
    """Ulysses: devices exchange tokens for heads, and each attends to whole rows with fewer heads.

    Four all-to-alls (Jacobs et al. 2023, https://arxiv.org/abs/2309.14509, §3.1).
    """
    length, over = query.shape[1], axis_names("length")
    heads = _head_axis(query, _repeat_heads(key, query.shape[2]))
    rules = {"length": None, "heads": (*axis_names(heads), *over)}
    with use_rules(rules):
        key, value = (_repeat_heads(x, query.shape[2]) for x in (key, value))
    split = f"rows length {heads}"
    query, key, value = (
        move_split(pad_length(x), split, "length", heads) for x in (query, key, value)
    )
    segments = jax.tree.map(lambda x: pad_length(jnp.asarray(x)), mask.query)
    mask = dataclasses.replace(mask, query=segments, key=segments)
    with use_rules(rules):
        out = _attend_by_shards(query, key, value, mask, softcap, kind)
    return move_split(out, split, "length", heads, undo=True)[:, :length]


def _form(kind: str, zigzag: bool) -> Callable[..., jax.Array]:
    """The function that `map_shards` runs for a kind of attention."""
    if kind == "xla":
        return blockwise
    # Without a mesh, a Pallas kernel cannot be split over several devices.
    if kind == "cudnn" and (no_mesh() or not has_triton()):
        return functools.partial(cudnn, packed=blockwise)
    from jaxalign.models.attention.flash import flash

    form = functools.partial(flash, zigzag=zigzag)
    return form if kind == "pallas" else functools.partial(cudnn, packed=form)


def _repeat_heads(x: jax.Array, heads: int) -> jax.Array:
    """Keys or values, with repeated heads if there are fewer heads than shards."""
    shards, kv_heads = axis_shards("heads"), x.shape[2]
    fewer = kv_heads % shards and shards % kv_heads == 0 and heads % shards == 0
    return jnp.repeat(x, shards // kv_heads, axis=2) if fewer else x


def _head_axis(query: jax.Array, key: jax.Array) -> str:
    """The logical axis of heads if the shards divide them, else an axis that is never split."""
    divide = all(x.shape[2] % axis_shards("heads") == 0 for x in (query, key))
    return "heads" if divide else "hidden"


def blockwise(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: Segments,
    key_segments: Segments, windowed: jax.Array | None, *, window: int | None,
    softcap: float | None,
) -> jax.Array:  # fmt: skip
    """XLA attention on one device, which may hold only a part of every row; `map_shards` runs it.

    Args:
      query: `[B, T / n, H, d]`, scaled.
      key: `[B, T / n, K, d]`.
      value: `[B, T / n, K, d]`.
      query_segments: segments of this device's queries.
      key_segments: segments of the whole rows.
      windowed: bool `[1]`, whether the window applies; None: it does.
      window: how many positions a query attends to, including its own.
      softcap: the soft cap of the scores, or None.

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
    """The number of devices over which the compiler splits the scores."""
    return axis_shards("rows") * axis_shards("heads")
