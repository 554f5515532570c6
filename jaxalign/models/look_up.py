"""Token embeddings out of a table that is split over devices."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.parallel.sharding import constrain, constrain_last


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: jax.Array, ids: jax.Array, time: str = "length") -> jax.Array:
    """Rows of the table `[V, D]`: ids `[B, T]` → `[B, T, D]`; `time`: the logical axis of T.

    Where the table's columns are split over devices that have different rows, every device looks up
    its columns for all of them, and backward gets the gradient of its columns from all. Compilers
    that find a layout by themselves may send whole tables instead, which is more by as much as the
    vocabulary is larger than the batch.
    """
    axes = f"rows {time} embed"
    return constrain_last(jnp.take(table, constrain_last(ids, axes), axis=0, mode="clip"), axes)


def _look_up(
    table: jax.Array, ids: jax.Array, time: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table, ids, time), (table, ids)


def _looked_up(
    time: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    (table, ids), axes = saved, f"rows {time} embed"
    ids, gradient = constrain_last(ids, axes), constrain_last(gradient, axes)
    add = jax.linear_transpose(lambda table: jnp.take(table, ids, axis=0, mode="clip"), table)
    return constrain(add(gradient)[0], "vocab embed"), None


look_up.defvjp(_look_up, _looked_up)
