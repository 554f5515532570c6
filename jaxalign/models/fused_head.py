"""Head and log-softmax in one, chunk by chunk, with a backward pass of its own.

For hidden states h `[R, N, D]`, head W `[D, V]` and targets y: with z = finish(h·W)/τ,

    log p(y) = z_y − logsumexp(z),      H = logsumexp(z) − Σ_v p_v z_v.

Neither pass keeps logits: the forward pass keeps logsumexp and Σ p·z of each position, from which
the backward pass forms the gradient of a recomputed chunk,

    ∂/∂z = g·(onehot(y) − p) − e·p·(z − Σ p·z),

with g and e the incoming gradients of log p(y) and H. Chunks past the last position that is wanted
are skipped while the program runs, so that the cost grows with the trained positions only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

Finish = Callable[[jax.Array], jax.Array]
"""What a model does to its logits, elementwise (a soft-cap); hashable, so that jit can cache."""


def identity(logits: jax.Array) -> jax.Array:
    """Logits as they are."""
    return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_logprobs(
    chunk: int,
    entropy: bool,
    finish: Finish,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    wanted: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and, if asked for, the entropy.

    Args:
      chunk: positions of every row that are computed at a time; divides N.
      entropy: whether to compute the second result, which is 0 otherwise.
      finish: applied to the raw logits.
      hidden: `[R, N, D]`.
      head: `[D, V]`, in the dtype of `hidden`.
      targets: int32 `[R, N]`.
      temperature: float32 scalar; no gradient flows to it.
      wanted: int32 scalar; positions from here on may be skipped: their results are 0. None
        computes all.

    Returns:
      Two float32 `[R, N]`.
    """
    return _forward(chunk, entropy, finish, hidden, head, targets, temperature, wanted)[0]


def _logits(
    finish: Finish, hidden: jax.Array, head: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Logits of a chunk, and how a gradient comes back through `finish` and the temperature."""
    raw = jnp.matmul(hidden, head, preferred_element_type=jnp.float32).astype(jnp.float32)
    finished, back = jax.vjp(finish, raw)
    return finished / temperature, lambda g: back(g / temperature)[0]


def _forward(
    chunk: int, entropy: bool, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, wanted: jax.Array | None,
):  # fmt: skip
    zeros = jnp.zeros(targets.shape, jnp.float32)

    def one(i: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = functools.partial(_part, i, chunk)
        logits, _ = _logits(finish, part(hidden), head, temperature)
        logz = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, part(targets)[..., None], axis=-1, mode="clip")
        results = [chosen[..., 0] - logz, logz]
        if entropy:
            results.append(jnp.sum(jnp.exp(logits - logz[..., None]) * logits, axis=-1))
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
        return tuple(put(old, new, i * chunk) for old, new in zip(done, results, strict=True))

    start = (zeros,) * (3 if entropy else 2)
    count = _count(wanted, targets.shape[1], chunk)
    logprobs, logz, *mean = jax.lax.fori_loop(0, count, one, start)
    mean = mean[0] if entropy else zeros
    saved = (hidden, head, targets, temperature, wanted, logz, mean)
    return (logprobs, logz - mean if entropy else zeros), saved


def _backward(chunk: int, entropy: bool, finish: Finish, saved, gradients):
    hidden, head, targets, temperature, wanted, logz, mean = saved
    to_logprobs, to_entropy = gradients
    vocabulary = jnp.arange(head.shape[1], dtype=targets.dtype)[None, None]

    def one(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        to_hidden, to_head = done
        part = functools.partial(_part, i, chunk)
        states = part(hidden)
        logits, back = _logits(finish, states, head, temperature)
        probs = jnp.exp(logits - part(logz)[..., None])
        gradient = part(to_logprobs)[..., None]
        # Compared, not scattered: a scatter would be a second pass over all logits.
        to_logits = jnp.where(vocabulary == part(targets)[..., None], gradient, 0.0)
        to_logits -= probs * gradient
        if entropy:
            to_logits -= part(to_entropy)[..., None] * probs * (logits - part(mean)[..., None])
        to_logits = back(to_logits).astype(hidden.dtype)
        new = jnp.matmul(to_logits, head.T)
        to_hidden = jax.lax.dynamic_update_slice_in_dim(to_hidden, new, i * chunk, axis=1)
        flat = states.reshape(-1, states.shape[-1]), to_logits.reshape(-1, head.shape[1])
        to_head += jnp.matmul(flat[0].T, flat[1], preferred_element_type=jnp.float32)
        return to_hidden, to_head

    start = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    count = _count(wanted, targets.shape[1], chunk)
    to_hidden, to_head = jax.lax.fori_loop(0, count, one, start)
    return to_hidden, to_head.astype(head.dtype), None, None, None


def _part(i: jax.Array, chunk: int, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)


def _count(wanted: jax.Array | None, length: int, chunk: int) -> jax.Array | int:
    return length // chunk if wanted is None else (wanted + chunk - 1) // chunk


fused_logprobs.defvjp(_forward, _backward)
