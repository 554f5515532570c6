"""How queries reach other devices' keys and values, if the mesh splits rows along their length.

With a row of T tokens in n parts, H query heads and K key and value heads of width d on a device,
and b bytes per number, a device sends in one forward pass

    gather:   2 · K · T·d·b · (n − 1)/n        all-gather of keys and values
    ring:     the same, one part a turn        collective-permute
    ulysses:  2 · (H + K) · T·d·b · (n − 1)/n²     all-to-all: tokens for heads, and back

The backward pass of a ring sends the part again, and its float32 gradient, which has twice the
bytes of bfloat16. The backward pass of `ulysses` sends as much as its forward pass. Only `gather`
has whole keys and values on a device; `ulysses` has those of K/n heads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxalign.models.backend import backend
from jaxalign.models.base import DecoderConfig
from jaxalign.parallel.sharding import axis_shards, row_shards


class Exchange(NamedTuple):
    """How parts of rows attend to each other, and the reason.

    Attributes:
      kind: "gather", "ring" or "ulysses".
      why: the reason, in a few words for the user.
    """

    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})"


def choose_exchange(
    asked: str, kind: str, config: DecoderConfig, rows: int, length: int, dtype: Any
) -> Exchange:
    """Chooses the exchange for the mesh in context, which splits rows along their length.

    "auto" chooses `ulysses` if the parts divide the heads and it sends no more than `gather`.
    Otherwise it chooses `gather` if whole keys and values take at most `Backend.gathered_bytes` on
    a device. Otherwise it chooses `ulysses` if the parts divide the heads; if not, `ring` with
    plain XLA and `gather` with a kernel. A requested ring runs in plain XLA, whatever the kind.

    Args:
      asked: one of `parallel.rules.SEQUENCE_ATTENTION`.
      kind: the kind of attention.
      config: the model's config.
      rows: the rows of the batch, on all devices.
      length: the length of the rows.
      dtype: the dtype of keys and values.

    Raises:
      ValueError: "ulysses" with heads that the parts do not divide.
    """
    parts = axis_shards("length")
    heads, kv_heads = _device_heads(config)
    exchanged = _exchanged_kv_heads(heads, kv_heads, parts)
    if asked == "ulysses" and exchanged is None:
        raise ValueError(
            f"sequence_attention='ulysses': {heads} heads and {kv_heads} of keys and values on a "
            f"device do not divide over {parts} parts of a row; use ring or gather, or fewer parts"
        )
    if asked != "auto":
        return Exchange(asked, "asked for")
    if exchanged is not None and heads + exchanged <= parts * kv_heads:
        return Exchange("ulysses", "sends least")
    own_rows = rows // row_shards() if rows % row_shards() == 0 else rows
    size = 2 * own_rows * length * kv_heads * config.head_dim * jnp.dtype(dtype).itemsize
    why = f"a layer's keys and values are {size:,} bytes"
    if size <= backend().gathered_bytes:
        return Exchange("gather", why)
    if exchanged is not None:
        return Exchange("ulysses", why)
    if kind != "xla":
        return Exchange("gather", f"{kind} attention has no ring")
    return Exchange("ring", why)


def _device_heads(config: DecoderConfig) -> tuple[int, int]:
    """Query heads, and key and value heads, on a device that has a part of each row."""
    shards, heads, kv_heads = axis_shards("heads"), config.num_heads, config.num_kv_heads
    if heads % shards == 0 and kv_heads % shards == 0:
        return heads // shards, kv_heads // shards
    if heads % shards == 0 and shards % kv_heads == 0:
        return heads // shards, 1  # repeated
    return heads, kv_heads  # nothing splits them


def _exchanged_kv_heads(heads: int, kv_heads: int, parts: int) -> int | None:
    """Heads of keys and values that a device sends to the others, repeated if they are fewer than
    the parts; None: the parts do not divide the heads."""
    if heads % parts:
        return None
    if kv_heads % parts == 0:
        return kv_heads
    return parts if parts % kv_heads == 0 else None
