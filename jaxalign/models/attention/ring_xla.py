"""One turn of ring attention in plain XLA.

In zigzag order device i has the parts a = i and b = 2n − 1 − i of 2n. With the keys of another
device j, b always attends to all of part j. In addition, a attends to all of part j if j < i;
otherwise b attends to all of part 2n − 1 − j. So for any i and j a device computes two products of
half parts without a causal mask, batched into one.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxalign.models.attention import xla_blocks
from jaxalign.models.attention.mask import MaskSpec, Segments
from jaxalign.models.attention.ring import Form, Meeting, Options, Partial, merge
from jaxalign.models.attention.xla_blocks import MASKED_SCORE, XLAOptions

T = TypeVar("T")


def _forward(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, meeting: Meeting,
    own: bool,
) -> Partial:  # fmt: skip
    """See `ring.Form.forward`."""
    if own or not options.zigzag:
        return _attend(options, query, key, value, _mask(options, meeting, own), own)
    halves = _Halves(meeting)
    queries, keys, values = halves.queries(query), halves.keys(key), halves.keys(value)
    pair = _attend(options, queries, keys, values, _pair_mask(options, meeting, halves), False)
    late, other = (Partial(*both) for both in zip(*map(_split_rows, pair), strict=True))
    nothing = Partial(jnp.zeros_like(other.out), jnp.full_like(other.logz, MASKED_SCORE))
    early = halves.choose(other, nothing)
    late = merge(late, halves.choose(nothing, other))
    return Partial(*(jnp.concatenate(both, axis=1) for both in zip(early, late, strict=True)))


def _backward(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, meeting: Meeting,
    own: bool, whole: Partial, gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """See `ring.Form.backward`."""
    if own or not options.zigzag:
        mask = _mask(options, meeting, own)
        return _gradients(options, query, key, value, mask, own, whole, gradient)
    halves = _Halves(meeting)
    to_query, to_key, to_value = _gradients(
        options,
        halves.queries(query),
        halves.keys(key),
        halves.keys(value),
        _pair_mask(options, meeting, halves),
        False,
        Partial(halves.queries(whole.out), halves.queries(whole.logz)),
        halves.queries(gradient),
    )
    late, other = _split_rows(to_query)
    zeros = jnp.zeros_like(other)
    parts = halves.choose(other, zeros), late + halves.choose(zeros, other)
    return jnp.concatenate(parts, axis=1), halves.to_keys(to_key), halves.to_keys(to_value)


FORM = Form(_forward, _backward)
"""Plain XLA."""


class _Halves(NamedTuple):
    """Which half parts of a device's tokens meet which of another's, side by side along the rows:
    its late queries and the other's early keys; and early ones, or late ones."""

    meeting: Meeting

    def choose(self, early: T, late: T) -> T:
        """Selects the second pair's half: early tokens if the other device comes before."""
        before = self.meeting.source < self.meeting.device
        return jax.tree.map(lambda x, y: jnp.where(before, x, y), early, late)

    def queries(self, x: jax.Array) -> jax.Array:
        """`[B, t, …]` → `[2B, t / 2, …]`."""
        early, late = jnp.split(x, 2, axis=1)
        return jnp.concatenate([late, self.choose(early, late)])

    def keys(self, x: jax.Array) -> jax.Array:
        """`[B, t, …]` → `[2B, t / 2, …]`."""
        early, late = jnp.split(x, 2, axis=1)
        return jnp.concatenate([early, self.choose(early, late)])

    def to_keys(self, x: jax.Array) -> jax.Array:
        """Transposes `keys`: `[2B, t / 2, …]` → `[B, t, …]`."""
        first, other = _split_rows(x)
        zeros = jnp.zeros_like(other)
        parts = first + self.choose(other, zeros), self.choose(zeros, other)
        return jnp.concatenate(parts, axis=1)


def _split_rows(x: jax.Array) -> list[jax.Array]:
    return jnp.split(x, 2, axis=0)


def _mask(options: Options, meeting: Meeting, own: bool) -> MaskSpec:
    """The mask of the queries and keys here: another device's keys come first, all or none."""
    start = None
    if not own:
        size = meeting.query.ids.shape[1]
        start = jnp.where(meeting.source < meeting.device, size, -size)
    return _spec(options, meeting, meeting.query, meeting.key, start)


def _pair_mask(options: Options, meeting: Meeting, halves: _Halves) -> MaskSpec:
    query, key = (
        jax.tree.map(take, segments)
        for take, segments in ((halves.queries, meeting.query), (halves.keys, meeting.key))
    )
    after_all = jnp.asarray(meeting.query.ids.shape[1], jnp.int32)
    return _spec(options, meeting, query, key, after_all)


def _spec(
    options: Options, meeting: Meeting, query: Segments, key: Segments, start: jax.Array | None
) -> MaskSpec:
    windowed = None if meeting.windowed is None else meeting.windowed[0]
    return MaskSpec(query, key, False, options.window, windowed, start)


def _attend(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec,
    causal: bool,
) -> Partial:  # fmt: skip
    kv_heads = key.shape[2]
    static = XLAOptions(options.softcap, causal, 1, wide=True)
    out, (*_, logz) = xla_blocks.forward(
        static, _grouped(query, kv_heads), _heads_first(key), _heads_first(value), mask
    )
    return Partial(_ungrouped(out), _ungrouped(logz)[..., 0])


def _gradients(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, mask: MaskSpec,
    causal: bool, whole: Partial, gradient: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    kv_heads = key.shape[2]
    static = XLAOptions(options.softcap, causal, 1, wide=True)
    query, out, logz, gradient = (
        _grouped(x, kv_heads) for x in (query, whole.out, whole.logz[..., None], gradient)
    )
    residuals = (query, _heads_first(key), _heads_first(value), mask, out, logz)
    to_query, to_key, to_value, _ = xla_blocks.backward(static, residuals, gradient)
    return _ungrouped(to_query), _heads_first(to_key), _heads_first(to_value)


def _grouped(x: jax.Array, kv_heads: int) -> jax.Array:
    """`[B, t, H, d]` → `[B, K, G, t, d]`."""
    rows, size, _, width = x.shape
    return x.reshape(rows, size, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)


def _ungrouped(x: jax.Array) -> jax.Array:
    """`[B, K, G, t, d]` → `[B, t, H, d]`."""
    rows, _, _, size, width = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(rows, size, -1, width)


def _heads_first(x: jax.Array) -> jax.Array:
    """`[B, t, K, d]` ↔ `[B, K, t, d]`."""
    return x.transpose(0, 2, 1, 3)
