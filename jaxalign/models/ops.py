"""Projection and embedding look-up, each with a backward pass of its own."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxalign.parallel.sharding import constrain, constrain_last


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project(x: jax.Array, kernel: jax.Array, axes: str) -> jax.Array:
    """`x @ kernel`: `[B, T, in]`, `[in, out]` → `[B, T, out]`; `axes`: the kernel's logical ones.

    The kernel's gradient xᵀ·dy needs one operand transposed. Left alone, XLA's CPU compiler merges
    that transposition into the arithmetic that made dy, which then runs along columns; transposing
    x by itself made a whole backward pass about a sixth faster. Other backends transpose inside
    their matrix units and get the plain contraction.
    """
    return x @ kernel


def _project_forward(
    x: jax.Array, kernel: jax.Array, axes: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return x @ kernel, (x, kernel)


def _project_backward(
    axes: str, saved: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    elsewhere = functools.partial(_elsewhere, axes=axes)
    return jax.lax.platform_dependent(x, kernel, dy, cpu=_on_cpu, default=elsewhere)


def _on_cpu(x: jax.Array, kernel: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    dy = jax.lax.optimization_barrier(dy)
    transposed = jax.lax.optimization_barrier(x.reshape(-1, x.shape[-1]).T)
    return dy @ kernel.T, transposed @ dy.reshape(-1, dy.shape[-1])


def _elsewhere(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, *, axes: str
) -> tuple[jax.Array, jax.Array]:
    first, second = axes.split()
    if second == "embed":
        # What FSDP splits comes first: a TPU then adds up the devices' sums by a reduce-scatter,
        # where it sends twice as much (an all-reduce) to split the last axis.
        turned = constrain(jnp.einsum("btf,btd->df", x, dy), f"{second} {first}")
        return dy @ kernel.T, turned.T
    return dy @ kernel.T, constrain(jnp.einsum("btd,btf->df", x, dy), axes)


project.defvjp(_project_forward, _project_backward)


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


def _look_up_forward(
    table: jax.Array, ids: jax.Array, time: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return look_up(table, ids, time), (table, ids)


def _look_up_backward(
    time: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, None]:
    (table, ids), axes = saved, f"rows {time} embed"
    ids, gradient = constrain_last(ids, axes), constrain_last(gradient, axes)
    add = jax.linear_transpose(lambda table: jnp.take(table, ids, axis=0, mode="clip"), table)
    return constrain(add(gradient)[0], "vocab embed"), None


look_up.defvjp(_look_up_forward, _look_up_backward)
