"""Ring attention: keys and values pass round the devices that split a row; none has all of them.

With parts S₁, …, Sₙ of the keys, o_j the output and z_j the logsumexp of the attention to Sⱼ alone,

    z = log Σ_j exp(z_j),      o = Σ_j exp(z_j − z) · o_j

(Liu et al. 2023, https://arxiv.org/abs/2310.01889). Each turn adds one part to the sum, in float32.
The backward pass sends keys and values round again and recomputes the weights from z. The float32
sums of their gradients travel with them and return to their device after n turns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.attention.mask import Segments
from jaxalign.parallel.shard_map import axis_names, pass_on, shard_index
from jaxalign.parallel.sharding import axis_shards


class Partial(NamedTuple):
    """The attention of a device's queries to some of the keys.

    Attributes:
      out: float32 `[B, t, H, d]`.
      logz: float32 `[B, t, H]`, logsumexp of the scores; at most −1e30 for a query that attends to
        none of the keys.
    """

    out: jax.Array
    logz: jax.Array


class Meeting(NamedTuple):
    """The queries and keys of one turn.

    Attributes:
      query: segments of this device's t queries.
      key: segments of the t keys that it holds in this turn.
      windowed: bool `[1]`, whether the window applies; None: it does.
      device: int32 scalar, the index of the queries' part of the row.
      source: int32 scalar, the index of the keys' part.
    """

    query: Segments
    key: Segments
    windowed: jax.Array | None
    device: jax.Array
    source: jax.Array


class Form(NamedTuple):
    """Attention to one part of the keys; module-level functions, so that a `Form` is hashable.

    Attributes:
      forward: `(options, query, key, value, meeting, own) -> Partial`. `own` tells whether the keys
        belong to the queries' own part.
      backward: `(options, query, key, value, meeting, own, whole, gradient)` → float32 gradients of
        query, key and value; `whole` is the attention to all parts, its `out` in the inputs' dtype.
    """

    forward: Callable[..., Partial]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class Options(NamedTuple):
    """Static options.

    Attributes:
      form: how to attend to one part.
      axes: names of the mesh axes that split rows along their length.
      parts: n, the number of parts.
      zigzag: the tokens of every row are in zigzag order.
      window: how many positions a query attends to, including its own; None: all.
      softcap: the soft cap of the scores, or None.
    """

    form: Form
    axes: tuple[str, ...]
    parts: int
    zigzag: bool
    window: int | None
    softcap: float | None


def ring(
    query: jax.Array, key: jax.Array, value: jax.Array, query_segments: Segments,
    key_segments: Segments, windowed: jax.Array | None, *, form: Form, zigzag: bool,
    window: int | None, softcap: float | None,
) -> jax.Array:  # fmt: skip
    """Ring attention on one device of those that split rows; `map_shards` runs it.

    Args:
      query: `[B, T / n, H, d]`, scaled.
      key: `[B, T / n, K, d]`.
      value: `[B, T / n, K, d]`.
      query_segments: segments of this device's queries, which are also part of the whole rows.
      key_segments: segments of the whole rows.
      windowed: bool `[1]`, whether the window applies; None: it does.
      form: how to attend to one part.
      zigzag: the tokens of every row are in zigzag order.
      window: how many positions a query attends to, including its own.
      softcap: the soft cap of the scores, or None.

    Returns:
      `[B, T / n, H, d]`.
    """
    del query_segments
    options = Options(form, axis_names("length"), axis_shards("length"), zigzag, window, softcap)
    device = shard_index("length")
    return _ring(options, query, key, value, key_segments, windowed, device)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments,
    windowed: jax.Array | None, device: jax.Array,
) -> jax.Array:  # fmt: skip
    return _forward(options, query, key, value, segments, windowed, device)[0]


Residuals = tuple[
    jax.Array, jax.Array, jax.Array, Segments, jax.Array | None, jax.Array, jax.Array, jax.Array
]
"""The arguments, the output, and the logsumexp `[B, t, H]`."""


def _forward(
    options: Options, query: jax.Array, key: jax.Array, value: jax.Array, segments: Segments,
    windowed: jax.Array | None, device: jax.Array,
) -> tuple[jax.Array, Residuals]:  # fmt: skip
    size, parts = query.shape[1], options.parts

    def attend(keys: tuple[jax.Array, jax.Array], turn: Any, *, own: bool = False) -> Partial:
        meeting = _meeting(segments, windowed, device, turn, size, parts)
        return options.form.forward(options, query, *keys, meeting, own)

    def step(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        total, keys = carry
        # The next part is in transit while this one is computed.
        following = pass_on(keys, options.axes, parts)
        return (merge(total, attend(keys, turn)), following), None

    own = (key, value)
    keys = pass_on(own, options.axes, parts)
    total = attend(own, 0, own=True)
    (total, keys), _ = jax.lax.scan(step, (total, keys), jnp.arange(1, parts - 1))
    total = merge(total, attend(keys, parts - 1))
    out = total.out.astype(query.dtype)
    return out, (query, key, value, segments, windowed, device, out, total.logz)


def _backward(
    options: Options, residuals: Residuals, gradient: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    query, key, value, segments, windowed, device, out, logz = residuals
    size, parts = query.shape[1], options.parts
    whole = Partial(out, logz)

    def gradients(keys: tuple[jax.Array, jax.Array], turn: Any, *, own: bool = False) -> Any:
        meeting = _meeting(segments, windowed, device, turn, size, parts)
        back = options.form.backward
        to_query, *to_keys = back(options, query, *keys, meeting, own, whole, gradient)
        return to_query, tuple(to_keys)

    def step(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        to_query, keys, sums = carry
        following = pass_on(keys, options.axes, parts)
        more, to_keys = gradients(keys, turn)
        sums = pass_on(jax.tree.map(jnp.add, sums, to_keys), options.axes, parts)
        return (to_query + more, following, sums), None

    own = (key, value)
    keys = pass_on(own, options.axes, parts)
    to_query, sums = gradients(own, 0, own=True)
    sums = pass_on(sums, options.axes, parts)
    (to_query, keys, sums), _ = jax.lax.scan(step, (to_query, keys, sums), jnp.arange(1, parts - 1))
    more, to_keys = gradients(keys, parts - 1)
    sums = pass_on(jax.tree.map(jnp.add, sums, to_keys), options.axes, parts)  # home
    to_key, to_value = (x.astype(key.dtype) for x in sums)
    return (to_query + more).astype(query.dtype), to_key, to_value, None, None, None


_ring.defvjp(_forward, _backward)


def merge(x: Partial, y: Partial) -> Partial:
    """Merges the attention to two sets of keys."""
    logz = jnp.logaddexp(x.logz, y.logz)
    x_share, y_share = (jnp.exp(part.logz - logz)[..., None] for part in (x, y))
    return Partial(x_share * x.out + y_share * y.out, logz)


def _meeting(
    segments: Segments, windowed: jax.Array | None, device: jax.Array, turn: Any, size: int,
    parts: int,
) -> Meeting:  # fmt: skip
    """After k turns a device has the keys of the device k places before it."""
    source = (device - turn) % parts

    def part(index: jax.Array) -> Segments:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(jnp.asarray(x), index * size, size, 1), segments
        )

    return Meeting(part(device), part(source), windowed, device, source)
