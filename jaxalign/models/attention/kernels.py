"""Attention kernels that come with JAX: splash attention (TPU), cuDNN's flash attention (NVIDIA).

Both take scaled queries `[B, T, H, d]`, keys and values `[B, T, K, d]` of whole rows, and are
exact: no `[T, T]` matrix of scores is kept. Which case goes where is decided in
`jaxalign.models.attention.dispatch`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.attention.mask import Marks, Sight, visible
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
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Sight, softcap: float | None,
    heads: str = "hidden",
) -> jax.Array:  # fmt: skip
    """Splash attention, each device for its own rows, heads and part of time.

    Off TPUs the kernel runs in Pallas' interpreter, which is slow and for tests.

    Args:
      query: `[B, T, H, d]`, scaled.
      key: `[B, T, K, d]`.
      value: `[B, T, K, d]`.
      sight: without branches. The window counts columns, which is the same.
      softcap: of the scores, or None.
      heads: logical axis along which heads are split.

    Returns:
      `[B, T, H, d]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    length, parts = query.shape[1], axis_shards("length")
    block = _block(-(-length // parts))
    query, key, value = (pad_length(x, multiple=block) for x in (query, key, value))
    segments = pad_length(jnp.asarray(sight.looking.segments), multiple=block)
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
        mask = library.CausalMask((padded, padded), shard_count=parts)
        if window is not None:
            mask = library.LocalMask((padded, padded), (window - 1, 0), 0, shard_count=parts)
        return library.make_splash_mha(
            library.MultiHeadMask([mask] * count),
            block_sizes=sizes,
            head_shards=1,
            q_seq_shards=parts,
            attn_logits_soft_cap=softcap,
            interpret=backend().pallas_interpret,
        )

    windows = [sight.window] if sight.windowed is None else [None, sight.window]
    kernels = [kernel(window) for window in windows]

    def run(query, key, value, segments, row_segments, windowed, kernels):
        key, value = (gather_shards(x, "length", 1) for x in (key, value))
        args = *(x.transpose(0, 2, 1, 3) for x in (query, key, value)), segments, row_segments

        def one(kernel, query, key, value, own, row):
            ids = library.SegmentIds(q=own, kv=row)
            return jax.vmap(kernel)(query, key, value, segment_ids=ids)

        branches = [functools.partial(one, kernel) for kernel in kernels]
        chosen = None if windowed is None else windowed[0]
        return _either(branches, chosen, args).transpose(0, 2, 1, 3)

    axes: list[Any] = [f"rows length {heads}"] * 3 + ["rows length", "rows", "new"]
    if not jax.sharding.get_abstract_mesh().empty:
        axes.append(
            [kernel.manual_sharding_spec(named_sharding("new length")) for kernel in kernels]
        )
    else:
        axes.append("")
    windowed = None if sight.windowed is None else jnp.asarray(sight.windowed)[None]
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
    query: jax.Array, key: jax.Array, value: jax.Array, looking: Marks, seen: Marks,
    windowed: jax.Array | None, *, window: int | None, softcap: float | None,
) -> jax.Array:  # fmt: skip
    """cuDNN's flash attention, on one device: to be run by `map_shards`.

    cuDNN knows causal masks and windows but no segments. Where every row is one document with
    padding after it, that is enough: nothing that counts comes after padding. Other rows (packed,
    padded on the left, with branches) get their mask as a bias, `[B, 1, T, S]` in the dtype of the
    query, made for one layer at a time. The device decides while it runs.

    Args:
      query: `[B, T, H, d]`, scaled; bfloat16 or float16.
      key: `[B, T, K, d]`, as much of the row as the query.
      value: `[B, T, K, d]`.
      looking: marks of the queries.
      seen: marks of the whole rows.
      windowed: bool `[1]`, whether the window holds; None: it does.
      window: how many tokens one sees, itself included.
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
    # Its backward pass wants even lengths. What is added comes last, where no causal query sees it.
    new, old = length % 2, key.shape[1] % 2
    query = jnp.pad(query, ((0, 0), (0, new), (0, 0), (0, 0)))
    key, value = (jnp.pad(x, ((0, 0), (0, old), (0, 0), (0, 0))) for x in (key, value))

    def masked(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        lookout = Sight(looking, seen, False, window, holds).lookout()
        lookout = lookout._replace(first=shard_index("length") * length)
        mask = jnp.pad(visible(lookout), ((0, 0), (0, 0), (0, new), (0, old)))
        return attend(query, key, value, mask=mask, is_causal=parts == 1)

    if parts > 1 or looking.branches is not None:
        return masked(query, key, value)[:, :length]

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, is_causal=True)

    def local(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        near = None if window is None else (window - 1, 0)
        return attend(query, key, value, is_causal=True, local_window_size=near)

    branches = [masked, local] if windowed is None else [masked, plain, local]
    which = _one_document(looking.segments).astype(jnp.int32)
    if holds is not None:
        which = which * (1 + holds.astype(jnp.int32))
    return jax.lax.switch(which, branches, query, key, value)[:, :length]


def _one_document(segments: jax.Array) -> jax.Array:
    """Whether every row `[B, T]` is one document with padding after it (or all padding)."""
    real = segments > 0
    same = jnp.all(~real | (segments == segments[:, :1]))
    return same & ~jnp.any(real[:, 1:] & ~real[:, :-1])


def _either(branches: list[Any], second: Any, args: tuple[jax.Array, ...]) -> jax.Array:
    """The only branch; or one of two, by a traced bool."""
    if len(branches) == 1:
        return branches[0](*args)
    return jax.lax.cond(second, branches[1], branches[0], *args)
