"""Attention kernels that come with JAX: splash attention (TPU), cuDNN's flash attention (NVIDIA).

Both take scaled queries `[B, T, H, d]` and keys and values `[B, T, K, d]` of whole rows. Both are
exact, and neither keeps a `[T, T]` matrix of scores. `jaxalign.models.attention.dispatch` decides
which one runs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.attention.mask import MaskSpec, Segments, make_mask
from jaxalign.models.backend import backend
from jaxalign.parallel.shard_map import (
    gather_shards,
    map_shards,
    named_sharding,
    pad_length,
    shard_index,
)
from jaxalign.parallel.sharding import axis_shards


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec, softcap: float | None,
    heads: str = "hidden",
) -> jax.Array:  # fmt: skip
    """Splash attention: each device for its own rows, heads and part of the length.

    A device all-gathers the keys and values of its rows along the length.

    Off TPUs the kernel runs in Pallas' interpreter, which is slow and for tests.

    Args:
      query: `[B, T, H, d]`, scaled.
      key: `[B, T, K, d]`.
      value: `[B, T, K, d]`.
      mask: without branches. The kernel's window counts columns; within a segment these are
        positions.
      softcap: of the scores, or None.
      heads: logical axis along which heads are split.

    Returns:
      `[B, T, H, d]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    assert mask.query is not None  # `attend` checks
    length, parts = query.shape[1], axis_shards("length")
    block = _block(-(-length // parts))
    query, key, value = (pad_length(x, multiple=block) for x in (query, key, value))
    segments = pad_length(jnp.asarray(mask.query.ids), multiple=block)
    padded = query.shape[1]
    count = query.shape[2] // axis_shards(heads)
    sizes = library.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )

    def kernel(window: int | None) -> Any:
        causal = library.CausalMask((padded, padded), shard_count=parts)
        if window is not None:
            causal = library.LocalMask((padded, padded), (window - 1, 0), 0, shard_count=parts)
        return library.make_splash_mha(
            library.MultiHeadMask([causal] * count),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=parts,
            attn_logits_soft_cap=softcap,
            interpret=backend().pallas_interpret,
        )

    windows = [mask.window] if mask.windowed is None else [None, mask.window]
    kernels = [kernel(window) for window in windows]

    def run(
        query: jax.Array, key: jax.Array, value: jax.Array, query_ids: jax.Array,
        key_ids: jax.Array, windowed: jax.Array | None, kernels: list[Any],
    ) -> jax.Array:  # fmt: skip
        key, value = (gather_shards(x, "length", 1) for x in (key, value))  # [B, T / n, K, d] → T
        heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))  # [B, H, T, d]

        def attend(
            kernel: Any, query: jax.Array, key: jax.Array, value: jax.Array, q: jax.Array,
            kv: jax.Array,
        ) -> jax.Array:  # fmt: skip
            ids = library.SegmentIds(q=q, kv=kv)
            return jax.vmap(kernel)(query, key, value, segment_ids=ids)

        args = (*heads_first, query_ids, key_ids)
        branches = [functools.partial(attend, kernel) for kernel in kernels]
        if windowed is None:
            out = branches[0](*args)
        else:
            out = jax.lax.cond(windowed[0], branches[1], branches[0], *args)
        return out.transpose(0, 2, 1, 3)  # [B, T / n, H, d]

    axes: list[Any] = [f"rows length {heads}"] * 3 + ["rows length", "rows", "new"]
    if not jax.sharding.get_abstract_mesh().empty:
        axes.append(
            [kernel.manual_sharding_spec(named_sharding("new length")) for kernel in kernels]
        )
    else:
        axes.append("")
    windowed = None if mask.windowed is None else jnp.asarray(mask.windowed)[None]
    args = (query, key, value, segments, segments, windowed, kernels)
    return map_shards(run, args, axes)[:, :length]


def _block(length: int) -> int:
    """Side of the blocks for rows of this length."""
    platform = backend()
    for block in platform.splash_blocks:
        if -length % block <= platform.splash_padding * length:
            return block
    return platform.splash_blocks[-1]


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: Segments,
    key_segments: Segments, windowed: jax.Array | None, *, window: int | None,
    softcap: float | None,
) -> jax.Array:  # fmt: skip
    """cuDNN's flash attention on one device; `map_shards` runs it.

    cuDNN has causal masks and windows but no segments. Those are enough where every row is one
    document with padding after it, since no real token comes after padding. Other rows (packed,
    padded on the left, with branches) pass their mask as a bias `[B, 1, T, S]` in the dtype of the
    query, made for one layer at a time. The choice is made on the device at run time.

    Args:
      query: `[B, T, H, d]`, scaled; bfloat16 or float16.
      key: `[B, T, K, d]`, as much of the row as the query.
      value: `[B, T, K, d]`.
      query_segments: of this device's queries.
      key_segments: of the whole rows.
      windowed: bool `[1]`, whether the window holds; None: it does.
      window: how many positions a query attends to, its own included.
      softcap: None; cuDNN has none.

    Returns:
      `[B, T, H, d]`.
    """
    if softcap is not None:
        raise ValueError(f"cuDNN attention has no soft cap; got {softcap}: use attention='xla'")
    parts = axis_shards("length")
    attend = functools.partial(jax.nn.dot_product_attention, scale=1.0, implementation="cudnn")
    key, value = (gather_shards(x, "length", 1) for x in (key, value))
    holds = None if windowed is None else windowed[0]
    length = query.shape[1]
    # cuDNN's backward pass wants even lengths. Padding comes last: no causal query attends to it.
    query_pad, key_pad = length % 2, key.shape[1] % 2
    query = jnp.pad(query, ((0, 0), (0, query_pad), (0, 0), (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), (0, key_pad), (0, 0), (0, 0))) for x in (key, value))

    def masked(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        start = shard_index("length") * length
        spec = MaskSpec(query_segments, key_segments, False, window, holds, start)
        mask = jnp.pad(make_mask(spec), ((0, 0), (0, 0), (0, query_pad), (0, key_pad)))
        return attend(query, key, value, mask=mask, is_causal=parts == 1)

    if parts > 1 or query_segments.branches is not None:
        return masked(query, key, value)[:, :length]

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, is_causal=True)

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        near = None if window is None else (window - 1, 0)
        return attend(query, key, value, is_causal=True, local_window_size=near)

    branches = [masked, local] if windowed is None else [masked, plain, local]
    which = _one_document(query_segments.ids).astype(jnp.int32)
    if holds is not None:
        which = which * (1 + holds.astype(jnp.int32))
    return jax.lax.switch(which, branches, query, key, value)[:, :length]


def _one_document(segments: jax.Array) -> jax.Array:
    """Whether every row `[B, T]` is one document with padding after it (or all padding)."""
    real = segments > 0
    same = jnp.all(~real | (segments == segments[:, :1]))
    return same & ~jnp.any(real[:, 1:] & ~real[:, :-1])
