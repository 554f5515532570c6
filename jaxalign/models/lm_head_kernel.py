"""Fused head and log-softmax, chunk by chunk, with a custom backward pass.

For hidden states h `[R, N, D]`, head W `[D, V]` and targets y: with logits x = finish(h·W),

    z = (x − max_v x_v)/τ,      log p(y) = z_y − log Σ exp(z),      H = log Σ exp(z) − Σ_v p_v z_v.

The maximum is subtracted before the division by τ. Otherwise, for logits around 1,000 at τ = 0.1,
float32 would keep two decimals, and the entropy, a difference of such numbers, none.

Neither pass keeps logits: the forward pass keeps the maximum, log Σ exp(z) and Σ p·z of each
position, from which the backward pass forms the gradient of a recomputed chunk,

    ∂/∂z = g·(onehot(y) − p) − e·p·(z − Σ p·z),

with g and e the incoming gradients of log p(y) and H. Valid positions come first in every row, and
chunks after the last valid position are skipped at run time: the cost depends only on trained
positions.

For a sum Σ w·log p(y) with known weights, ∂/∂z is known up to one factor as soon as a chunk's
logits are. `fused_total` therefore computes the gradients of hidden states and head in the forward
pass, and never recomputes logits (as Hsu et al. 2024, https://arxiv.org/abs/2410.10989, §3.2).

On a mesh every device handles its own rows and its own columns of the head. No collective runs
inside the loop over chunks:

- Before it, the head is all-gathered over the mesh axes that shard its rows D (FSDP), once for both
  passes: D·V values, divided by the shards of the vocabulary.
- After the forward loop, maximum, z_y, Σ exp(z) and Σ p·z of each position are all-reduced over the
  shards of the vocabulary, if there are several.
- After the backward loop, the float32 gradient of the head is reduce-scattered over the axes of the
  all-gather, and all-reduced over the other axes that shard rows (data). The gradient of hidden
  states is all-reduced over the shards of the vocabulary.

Parts s of the vocabulary, with maxima m_s, sums S_s = Σ exp(z) and means M_s, are joined
with d_s = (m_s − max m)/τ by

    S = Σ_s exp(d_s) S_s,      Σ_v p_v z_v = Σ_s exp(d_s) S_s/S · (M_s + d_s).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.exp_sum import ExpSum, exp_sum, exp_sum_beside
from jaxalign.models.lm_head_split import HeadSplit, Operands, head_split

Entropy = Literal["none", "value", "gradient"]
"""Whether entropies are computed, and whether a gradient flows through them: that is a second pass
over the logits of the backward pass."""

Finish = Callable[[jax.Array], jax.Array]
"""A model's elementwise function of its logits (a soft cap); hashable, so that jit can cache."""


def identity(logits: jax.Array) -> jax.Array:
    """Returns the logits unchanged."""
    return logits


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_logprobs(
    chunk: int,
    entropy: Entropy,
    finish: Finish,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    num_valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The log-probability of each target and, optionally, the entropy.

    Args:
      chunk: positions of every row that are computed at a time; divides N.
      entropy: "none": the second result is 0; "value": it is computed, and no gradient flows
        through it; "gradient".
      finish: applied to the raw logits.
      hidden: `[R, N, D]`.
      head: `[D, V]`, in the dtype of `hidden`.
      targets: int32 `[R, N]`.
      temperature: float32 scalar; no gradient flows to it.
      num_valid: int32 scalar, the largest number of valid positions in a row; later positions are
        skipped and give 0. None: all are valid.

    Returns:
      Two float32 `[R, N]`.
    """
    return _forward(chunk, entropy, finish, hidden, head, targets, temperature, num_valid)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_total(
    chunk: int,
    entropy: bool,
    finish: Finish,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    num_valid: jax.Array | None,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ weights · log p(target), and its terms.

    A gradient flows only through the sum, to `hidden` and `head`.

    Args:
      chunk, finish, hidden, head, targets, temperature, num_valid: as for `fused_logprobs`.
      entropy: whether entropies are computed; else they are 0.
      weights: float32 `[R, N]`; 0 from position `num_valid` on.

    Returns:
      The sum, float32; log-probabilities and entropies, two float32 `[R, N]`.
    """
    args = (hidden, head, targets, temperature, num_valid)
    logprobs, entropies = _forward(chunk, "value" if entropy else "none", finish, *args)[0]
    return jnp.sum(weights * logprobs), logprobs, entropies


class Normalizers(NamedTuple):
    """The values of each position that the backward pass needs, float32 `[R, N]`.

    Attributes:
      top: the largest logit x before the division by the temperature, over the whole vocabulary.
      logz: log Σ exp(z) over the whole vocabulary.
      mean: Σ_v p_v z_v, or 0 without entropy.
      logprobs: log p(y).
    """

    top: Any
    logz: Any
    mean: Any
    logprobs: Any


class Logits(NamedTuple):
    """Logits of a chunk of P positions.

    Attributes:
      shifted: z `[P, V]`, at most 0.
      top: the amount subtracted from x, `[P]`.
      chosen: maps columns `[P]` to their z, `[P]`. It reads x: were z read, it would have to be
        stored, a pass over `[P, V]` more.
      pullback: maps a gradient of z `[P, V]` to the gradient of `hidden·head`.
    """

    shifted: jax.Array
    top: jax.Array
    chosen: Callable[[jax.Array], jax.Array]
    pullback: Callable[[jax.Array], jax.Array]


def _logits(
    finish: Finish, hidden: jax.Array, head: jax.Array, temperature: jax.Array,
    top: jax.Array | None = None,
) -> Logits:  # fmt: skip
    """Logits of hidden states `[P, D]`, minus `top` `[P]` or else the maximum of each position."""
    raw = jnp.matmul(hidden, head, preferred_element_type=jnp.float32).astype(jnp.float32)
    finished, pullback = jax.vjp(finish, raw)
    if top is None:
        top = jnp.max(finished, axis=-1)
    shifted = (finished - top[..., None]) / temperature

    def chosen(column: jax.Array) -> jax.Array:
        x = jnp.take_along_axis(finished, column[..., None], axis=-1, mode="clip")[..., 0]
        return (x - top) / temperature

    return Logits(shifted, top, chosen, lambda g: pullback(g / temperature)[0])


Saved = tuple[Operands, Normalizers]


def _forward(
    chunk: int, entropy: Entropy, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, num_valid: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], Saved]:  # fmt: skip
    split = head_split(hidden.shape[0], *head.shape)
    operands = Operands(hidden, head, targets, temperature, num_valid)
    normalizers, gathered = split.run(
        functools.partial(_forward_shard, chunk, entropy, finish, split),
        (split.operands(split.sharded_head),),
        (Normalizers(*(split.by_row,) * 4), split.gathered_head),
        operands,
    )
    mean = normalizers.mean
    results = normalizers.logprobs, mean if entropy == "none" else normalizers.logz - mean
    return results, (operands._replace(head=gathered), normalizers)


def _forward_shard(
    chunk: int, entropy: Entropy, finish: Finish, split: HeadSplit, operands: Operands
) -> tuple[Normalizers, jax.Array]:
    """One device's forward pass.

    Returns:
      (normalizers `[R, N]`, the gathered head `[D, V]` for the backward pass), with logits of its
      part of the vocabulary joined with those of the other parts.
    """
    hidden, head, targets, temperature, num_valid = operands
    if split.embed:
        head = jax.lax.all_gather(head, split.embed, axis=0, tiled=True)  # [D / n, V] → [D, V]
    columns, first = head.shape[1], _first_column(head, split)

    def chunk_step(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        take = functools.partial(_take_chunk, i, chunk)
        z, top, of_column, _ = _logits(finish, take(hidden), head, temperature)  # [R·c, V]
        column = take(targets) - first  # [R·c]
        if entropy == "none":
            chosen = of_column(column)
        else:  # three passes over z: storing it costs less than dividing three times
            chosen = jnp.take_along_axis(z, column[..., None], axis=-1, mode="clip")[..., 0]
        sums = exp_sum_beside(z, column, chosen) if entropy == "none" else exp_sum(z)
        new = [top, chosen, *sums]
        if entropy != "none":
            logz = sums.log()[..., None]
            new.append(jnp.sum(jnp.exp(z - logz) * z, axis=-1))
        put = functools.partial(_put_chunk, i, chunk)
        return tuple(map(put, results, new))

    # For a skipped chunk everything is 0: log-probability, entropy and log Σ exp(z).
    zeros, ones = (fill(targets.shape, jnp.float32) for fill in (jnp.zeros, jnp.ones))  # [R, N]
    start = (zeros, zeros, ones, zeros) + ((zeros,) if entropy != "none" else ())
    count = _num_chunks(num_valid, targets.shape[1], chunk)
    top, chosen, apart, rest, *means = jax.lax.fori_loop(0, count, chunk_step, start)
    sums, mean = ExpSum(apart, rest), means[0] if means else zeros
    if split.vocabulary:
        own = (targets >= first) & (targets < first + columns)
        top, chosen, sums, mean = _join_vocabulary(
            split.vocabulary, temperature, entropy, own, top, chosen, sums, mean
        )
        if num_valid is not None:
            done = jnp.arange(targets.shape[1])[None] < count * chunk
            chosen, mean = (jnp.where(done, x, 0.0) for x in (chosen, mean))
            sums = ExpSum(jnp.where(done, sums.apart, 1.0), jnp.where(done, sums.rest, 0.0))
    logz = sums.log()
    return Normalizers(top, logz, mean, chosen - logz), head


def _join_vocabulary(
    axes: tuple[str, ...], temperature: jax.Array, entropy: Entropy, own: jax.Array,
    top: jax.Array, chosen: jax.Array, sums: ExpSum, mean: jax.Array,
) -> tuple[jax.Array, jax.Array, ExpSum, jax.Array]:  # fmt: skip
    """The results of one part of the vocabulary, joined with those of the other parts.

    Args:
      axes: mesh axes that shard the vocabulary.
      temperature: float32 scalar.
      entropy: if "none", the target is what stands apart in `sums`; else the largest logits are.
      own: `[R, N]`, whether the target is in this part.
      top, chosen, sums, mean: the results of this part, `[R, N]`.
    """
    largest = jax.lax.pmax(top, axes)
    shift = (top - largest) / temperature  # d_s
    logz = sums.log() + shift
    # If another part has a larger logit, this part's largest becomes one of the rest.
    stays = (shift >= 0) | (entropy == "none")
    apart, moved = jnp.where(stays, sums.apart, 0.0), jnp.where(stays, 0.0, sums.apart)
    scale = jnp.exp(shift)
    joined = ExpSum(*jax.lax.psum((scale * apart, scale * (sums.rest + moved)), axes))
    mean = jnp.exp(logz - joined.log()) * (mean + shift)
    chosen = jnp.where(own, chosen + shift, 0.0)
    chosen, mean = jax.lax.psum((chosen, mean), axes)
    return largest, chosen, joined, mean


def _backward(
    chunk: int, entropy: Entropy, finish: Finish, saved: Saved,
    gradients: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None, None]:  # fmt: skip
    operands, normalizers = saved
    head = operands.head
    split = head_split(operands.hidden.shape[0], *head.shape)
    by_row = split.by_row
    to_hidden, to_head = split.run(
        functools.partial(_backward_shard, chunk, entropy, finish, split),
        (split.operands(split.gathered_head), Normalizers(*(by_row,) * 4), by_row, by_row),
        (by_row, split.sharded_head),
        operands, normalizers, *gradients,
    )  # fmt: skip
    return to_hidden, to_head.astype(head.dtype), None, None, None


def _backward_shard(
    chunk: int, entropy: Entropy, finish: Finish, split: HeadSplit, operands: Operands,
    normalizers: Normalizers, to_logprobs: jax.Array, to_entropy: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One device's gradients of its hidden states `[R, N, D]` and of its part of the head."""
    hidden, head, targets, temperature, num_valid = operands
    top, logz, mean, logprobs = normalizers
    vocabulary = jnp.arange(head.shape[1], dtype=targets.dtype)[None]  # [1, V]
    vocabulary += _first_column(head, split)

    def chunk_step(i: jax.Array, sums: HeadGradients) -> HeadGradients:
        take = functools.partial(_take_chunk, i, chunk)
        states = take(hidden)  # [R·c, D]
        z, _, _, pullback = _logits(finish, states, head, temperature, take(top))  # [R·c, V]
        probs = jnp.exp(z - take(logz)[..., None])
        chosen = vocabulary == take(targets)[..., None]
        to_logits = _to_logits(probs, chosen, take(logprobs), take(to_logprobs))
        if entropy == "gradient":
            to_logits -= take(to_entropy)[..., None] * probs * (z - take(mean)[..., None])
        to_logits = pullback(to_logits).astype(hidden.dtype)
        return _add_gradients(i, chunk, states, head, to_logits, sums)

    start = HeadGradients(jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    count = _num_chunks(num_valid, targets.shape[1], chunk)
    to_hidden, to_head = jax.lax.fori_loop(0, count, chunk_step, start)
    if split.vocabulary:
        to_hidden = jax.lax.psum(to_hidden, split.vocabulary)
    return to_hidden, _reduce_head_gradient(to_head, split)


def _to_logits(
    probs: jax.Array, chosen: jax.Array, logprobs: jax.Array, gradient: jax.Array
) -> jax.Array:
    """g·(onehot(y) − p), the gradient of log p(y) to the logits: `[P, V]`.

    1 − p(y) is computed from log p(y): if p(y) is close to 1, the difference would lose all digits.

    Args:
      probs: p, `[P, V]`.
      chosen: where v is the target, `[P, V]`: a comparison, since a scatter would be another pass.
      logprobs: log p(y), `[P]`.
      gradient: g, `[P]`.
    """
    to_chosen = -jnp.expm1(logprobs) * gradient
    return jnp.where(chosen, to_chosen[..., None], -probs * gradient[..., None])


class HeadGradients(NamedTuple):
    """Gradients of hidden states `[R, N, D]` and, in float32, of the head `[D, V]`.

    Or the `PartitionSpec` of each.
    """

    hidden: Any
    head: Any


def _add_gradients(
    i: jax.Array, chunk: int, states: jax.Array, head: jax.Array, to_logits: jax.Array,
    sums: HeadGradients,
) -> HeadGradients:  # fmt: skip
    """Adds a chunk's contribution: states `[R·c, D]`, gradient of its logits `[R·c, V]`."""
    to_hidden, to_head = sums
    to_hidden = _put_chunk(i, chunk, to_hidden, jnp.matmul(to_logits, head.T))
    to_head += jnp.matmul(states.T, to_logits, preferred_element_type=jnp.float32)  # [D, V]
    return HeadGradients(to_hidden, to_head)


def _reduce_head_gradient(to_head: jax.Array, split: HeadSplit) -> jax.Array:
    """One device's float32 gradient of the head `[D, V]`, summed over devices and sharded.

    A reduce-scatter over the axes that shard the head's rows, an all-reduce over the others that
    shard the batch's rows.
    """
    if split.embed:
        to_head = jax.lax.psum_scatter(to_head, split.embed, scatter_dimension=0, tiled=True)
    others = tuple(name for name in split.rows if name not in split.embed)
    to_head = jax.lax.psum(to_head, others) if others else to_head
    if split.rows:
        # XLA's TPU compiler moves sums over devices out of a loop over micro-batches, and fails if
        # their results are converted before they are accumulated.
        to_head = jax.lax.optimization_barrier(to_head)
    return to_head


def _total_forward(
    chunk: int, entropy: bool, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, num_valid: jax.Array | None, weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:  # fmt: skip
    """The sum, its terms, and the gradients without the incoming factor."""
    split = head_split(hidden.shape[0], *head.shape)
    operands = Operands(hidden, head, targets, temperature, num_valid)
    if split.vocabulary:  # the logsumexp is known only after combining all parts of the vocabulary
        kind = "value" if entropy else "none"
        (logprobs, entropies), saved = _forward(chunk, kind, finish, *operands)
        return (jnp.sum(weights * logprobs), logprobs, entropies), (saved, weights)
    by_row = split.by_row
    logprobs, entropies, gradients = split.run(
        functools.partial(_total_shard, chunk, entropy, finish, split),
        (split.operands(split.sharded_head), by_row),
        (by_row, by_row, HeadGradients(by_row, split.sharded_head)),
        operands, weights,
    )  # fmt: skip
    # The empty array carries the head's dtype to the backward pass.
    saved = gradients, jnp.zeros((), head.dtype)
    return (jnp.sum(weights * logprobs), logprobs, entropies), saved


def _total_backward(
    chunk: int, entropy: bool, finish: Finish, saved: Any, gradients: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, None, None, None, None]:
    factor = gradients[0]  # ∂/∂total; no gradient flows through the other results
    if not isinstance(saved[0], HeadGradients):
        forward, weights = saved
        to_results = factor * weights, jnp.zeros_like(weights)
        return (*_backward(chunk, "none", finish, forward, to_results), None)
    (to_hidden, to_head), like_head = saved
    to_hidden = (to_hidden * factor).astype(to_hidden.dtype)
    return to_hidden, (to_head * factor).astype(like_head.dtype), None, None, None, None


def _total_shard(
    chunk: int, entropy: bool, finish: Finish, split: HeadSplit, operands: Operands,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, HeadGradients]:  # fmt: skip
    """One device's log p and entropy `[R, N]`, and the gradients of its Σ w·log p."""
    hidden, head, targets, temperature, num_valid = operands
    zeros = jnp.zeros(targets.shape, jnp.float32)  # [R, N]
    if split.embed:
        head = jax.lax.all_gather(head, split.embed, axis=0, tiled=True)  # [D / n, V] → [D, V]
    vocabulary = jnp.arange(head.shape[1], dtype=targets.dtype)[None]  # [1, V]

    def chunk_step(i: jax.Array, carry: tuple[Any, HeadGradients]) -> tuple[Any, HeadGradients]:
        results, gradients = carry
        take = functools.partial(_take_chunk, i, chunk)
        states, column = take(hidden), take(targets)  # [R·c, D], [R·c]
        z, _, of_column, pullback = _logits(finish, states, head, temperature)  # [R·c, V]
        value = of_column(column)
        sums = exp_sum(z) if entropy else exp_sum_beside(z, column, value)
        logz = sums.log()
        probs = jnp.exp(z - logz[..., None])
        logprobs = value - logz
        new = [logprobs]
        if entropy:
            new.append(logz - jnp.sum(probs * z, axis=-1))
        chosen = vocabulary == column[..., None]
        to_logits = _to_logits(probs, chosen, logprobs, take(weights))
        to_logits = pullback(to_logits).astype(hidden.dtype)
        gradients = _add_gradients(i, chunk, states, head, to_logits, gradients)
        return tuple(map(functools.partial(_put_chunk, i, chunk), results, new)), gradients

    start = HeadGradients(jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    count = _num_chunks(num_valid, targets.shape[1], chunk)
    results, (to_hidden, to_head) = jax.lax.fori_loop(
        0, count, chunk_step, ((zeros,) * (2 if entropy else 1), start)
    )
    gradients = HeadGradients(to_hidden, _reduce_head_gradient(to_head, split))
    return results[0], results[1] if entropy else zeros, gradients


def _first_column(head: jax.Array, split: HeadSplit) -> jax.Array | int:
    """The index of the first token in this device's part of the vocabulary."""
    return jax.lax.axis_index(split.vocabulary) * head.shape[1] if split.vocabulary else 0


def _take_chunk(i: jax.Array, chunk: int, x: jax.Array) -> jax.Array:
    """Chunk i of every row, rows end to end: `[R, N, …]` → `[R·c, …]`.

    Not `[R, c, …]`: sums over the last axis of `[1, N, V]` take XLA's CPU compiler 37 times as long
    as those of `[N, V]`.
    """
    part = jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)  # [R, c, …]
    return part.reshape(-1, *x.shape[2:])


def _put_chunk(i: jax.Array, chunk: int, old: jax.Array, new: jax.Array) -> jax.Array:
    """Writes chunk i, `[R·c, …]`, into `old`, `[R, N, …]`."""
    new = new.reshape(old.shape[0], chunk, *old.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(old, new, i * chunk, axis=1)


def _num_chunks(num_valid: jax.Array | None, length: int, chunk: int) -> jax.Array | int:
    return length // chunk if num_valid is None else (num_valid + chunk - 1) // chunk


fused_logprobs.defvjp(_forward, _backward)
fused_total.defvjp(_total_forward, _total_backward)
