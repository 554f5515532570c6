"""A balanced split of causal rows: every device along `sequence` gets an early and a late part.

If n devices split a row in order, the last one has several times as many pairs of query and key as
the first. In zigzag order the row is split into 2n parts, and device i has parts i and 2n − 1 − i,
so that all have equally many pairs (as in Llama 3's context parallelism, Grattafiori et al. 2024,
https://arxiv.org/abs/2407.21783, §3.3.2).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.parallel.shard_map import map_shards, shard_index
from jaxalign.parallel.sharding import axis_shards, constrain, mesh_axes


def zigzag_columns(length: int, parts: int) -> np.ndarray:
    """The column of each token of a row in zigzag order, int32 `[length]`.

    Args:
      length: the row's length; a multiple of 2 · parts.
      parts: the number of devices that split it.
    """
    size = length // (2 * parts)
    chunks = [chunk for i in range(parts) for chunk in (i, 2 * parts - 1 - i)]
    return (np.array(chunks)[:, None] * size + np.arange(size)).reshape(-1).astype(np.int32)


def to_zigzag(x: jax.Array) -> jax.Array:
    """Integers of tokens `[B, T]` in zigzag order, split over rows and time."""
    columns = zigzag_columns(x.shape[1], axis_shards("length"))
    return constrain(jnp.take(x, columns, axis=1), "rows length")


def from_zigzag(x: jax.Array) -> jax.Array:
    """`[B, T, …]` back from zigzag order: each device sends and receives two half parts."""
    parts = axis_shards("length")

    def run(x: jax.Array) -> jax.Array:
        names = mesh_axes("length", jax.sharding.get_abstract_mesh())
        low, high = jnp.split(x, 2, axis=1)
        # One of the parts i and 2n − 1 − i is even. Device i gets back the parts 2i and 2i + 1.
        is_even = shard_index("length") % 2 == 0
        halves = jnp.where(is_even, low, high), jnp.where(is_even, high, low)
        received = []
        for parity, half in enumerate(halves):
            chunks = [2 * i + parity for i in range(parts)]
            owners = [min(chunk, 2 * parts - 1 - chunk) for chunk in chunks]
            pairs = [(owner, i) for i, owner in enumerate(owners)]
            received.append(jax.lax.ppermute(half, names, pairs))
        return jnp.concatenate(received, axis=1)

    return map_shards(run, (x,), ("rows length",))
