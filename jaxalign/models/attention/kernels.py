"""Attention kernels that come with JAX: splash attention (TPU), cuDNN's flash attention (NVIDIA).

Both take scaled queries `[B, T, H, d]` and keys and values `[B, T, K, d]` of whole rows. Both are
exact, and neither keeps a `[T, T]` matrix of scores. `jaxalign.models.attention.dispatch` decides
which one runs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.attention.dispatch import takes_zigzag
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.backend import backend, record_choice
from jaxalign.parallel.shard_map import (
    gather_shards,
    map_shards,
    named_sharding,
    pad_length,
)
from jaxalign.parallel.sharding import axis_shards
from jaxalign.parallel.zigzag import zigzag_columns


def splash(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec, softcap: float | None,
    heads: str = "hidden",
) -> jax.Array:  # fmt: skip
    """Splash attention: each device for its own rows, heads and part of the length.

    A device all-gathers the keys and values of its rows along the length. In zigzag order it then
    restores their original order; the queries stay in place.

    Off TPUs the kernel runs in Pallas' interpreter, which is slow and for tests.

    Args:
      query: `[B, T, H, d]`, scaled.
      key: `[B, T, K, d]`.
      value: `[B, T, K, d]`.
      mask: without branches. The kernel's window counts columns; within a segment these are
        positions.
      softcap: the soft cap of the scores, or None.
      heads: logical axis along which heads are split.

    Returns:
      `[B, T, H, d]`.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    assert mask.query is not None  # `attend` has checked this
    length, parts = query.shape[1], axis_shards("length")
    block = _zigzag_block(length, parts) if mask.zigzag else _block(-(-length // parts))
    record_choice(f"splash: blocks of {block}")
    query, key, value = (pad_length(x, multiple=block) for x in (query, key, value))
    segments = key_segments = pad_length(jnp.asarray(mask.query.ids), multiple=block)
    padded = query.shape[1]
    columns = order = None
    if mask.zigzag:
        columns = zigzag_columns(length, parts)
        order = np.argsort(columns)
        key_segments = jnp.take(segments, order, axis=1)
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
        if columns is not None:
            causal.q_sequence = columns
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
        if order is not None:
            key, value = (jnp.take(x, order, axis=1) for x in (key, value))
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
    args = (query, key, value, segments, key_segments, windowed, kernels)
    return map_shards(run, args, axes)[:, :length]


def zigzag_multiple(kind: str, length: int, exchange: str = "gather") -> int | None:
    """Rows whose length is a multiple of this may be in zigzag order on the mesh in context.

    Args:
      kind: the kind of attention.
      length: the length of the rows.
      exchange: how queries meet other devices' keys, see `models.attention.exchange`.

    Returns:
      The length; None if nothing splits rows, if the kind of attention needs rows in order, or if
      its blocks would need more padding than `Backend.splash_padding`.
    """
    parts = axis_shards("length")
    if parts == 1 or exchange == "ulysses":  # it gives every device whole rows
        return None
    if exchange == "ring":
        return 2 * parts
    if not takes_zigzag(kind):
        return None
    if kind != "splash":
        return 2 * parts
    multiple = 2 * parts * _block(math.ceil(length / (2 * parts)))  # whole blocks in each half
    return None if -length % multiple > backend().splash_padding * length else multiple


def _zigzag_block(length: int, parts: int) -> int:
    """The largest block side that divides every half part of a row."""
    half = length // (2 * parts)
    for block in backend().splash_blocks:
        if half % block == 0 and length == 2 * parts * half:
            return block
    raise ValueError(
        f"{length} tokens in zigzag order over {parts} devices are no whole blocks; pad them to a "
        f"multiple of {2 * parts * backend().splash_blocks[-1]}"
    )


def _block(length: int) -> int:
    """The side of the blocks for rows of this length."""
    platform = backend()
    for block in platform.splash_blocks:
        if -length % block <= platform.splash_padding * length:
            return block
    return platform.splash_blocks[-1]


Packed = Callable[..., jax.Array]
"""An attention form for the rows that a causal mask does not describe: the signature of `cudnn`
without `packed`."""


def cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: Segments,
    key_segments: Segments, windowed: jax.Array | None, *, window: int | None,
    softcap: float | None, packed: Packed,
) -> jax.Array:  # fmt: skip
    """cuDNN's flash attention on one device; `map_shards` runs it.

    cuDNN has causal masks and windows but no segments. This suffices if every row is one document
    followed by padding, since no real token comes after padding. For other rows (several documents,
    padding on the left, branches) `packed` runs instead: a bias `[B, 1, T, S]` would be quadratic
    in the length, and cuDNN would compute a gradient for it. The choice is made on the device at
    run time, except if rows have branches or are split along their length.

    Args:
      query: `[B, T, H, d]`, scaled; bfloat16 or float16.
      key: `[B, T, K, d]`, as much of the row as the query.
      value: `[B, T, K, d]`.
      query_segments: segments of this device's queries.
      key_segments: segments of the whole rows.
      windowed: bool `[1]`, whether the window applies; None: it does.
      window: how many positions a query attends to, including its own.
      softcap: None; cuDNN has none.
      packed: attention that supports segments.

    Returns:
      `[B, T, H, d]`.
    """
    if softcap is not None:
        raise ValueError(f"cuDNN attention has no soft cap; got {softcap}: use attention='xla'")

    def segmented(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        segments = (query_segments, key_segments, windowed)
        return packed(query, key, value, *segments, window=window, softcap=None)

    if axis_shards("length") > 1 or query_segments.branches is not None:
        return segmented(query, key, value)

    def causal(
        query: jax.Array, key: jax.Array, value: jax.Array, near: tuple[int, int] | None = None
    ) -> jax.Array:
        # cuDNN's backward pass needs even lengths. The padding comes last, so no causal query
        # attends to it.
        length = query.shape[1]
        query, key, value = (
            jnp.pad(x, ((0, 0), (0, length % 2), (0, 0), (0, 0))) for x in (query, key, value)
        )
        out = jax.nn.dot_product_attention(
            query, key, value, scale=1.0, is_causal=True, local_window_size=near,
            implementation="cudnn",
        )  # fmt: skip
        return out[:, :length]

    near = None if window is None else (window - 1, 0)
    branches = [segmented, functools.partial(causal, near=near)]
    which = _one_document(query_segments.ids).astype(jnp.int32)
    if windowed is not None:
        branches.insert(1, causal)
        which = which * (1 + windowed[0].astype(jnp.int32))
    return jax.lax.switch(which, branches, query, key, value)


def _one_document(segments: jax.Array) -> jax.Array:
    """Whether every row `[B, T]` is one document followed by padding (or all padding)."""
    real = segments > 0
    same = jnp.all(~real | (segments == segments[:, :1]))
    return same & ~jnp.any(real[:, 1:] & ~real[:, :-1])
