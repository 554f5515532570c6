"""Head and log-softmax in one, chunk by chunk, with a backward pass of its own.

For hidden states h `[R, N, D]`, head W `[D, V]` and targets y: with z = finish(h·W)/τ,

    log p(y) = z_y − logsumexp(z),      H = logsumexp(z) − Σ_v p_v z_v.

Neither pass keeps logits: the forward pass keeps logsumexp and Σ p·z of each position, from which
the backward pass forms the gradient of a recomputed chunk,

    ∂/∂z = g·(onehot(y) − p) − e·p·(z − Σ p·z),

with g and e the incoming gradients of log p(y) and H. Chunks past the last position that is wanted
are skipped while the program runs, so that the cost grows with the trained positions only.

Of a sum Σ w·log p(y) whose weights are known beforehand, ∂/∂z is known as soon as a chunk's logits
are, up to one factor: `fused_total` forms the gradients of hidden states and head in the forward
pass, and no logits a second time (as Hsu et al. 2024, https://arxiv.org/abs/2410.10989, §3.2).

On a mesh every device walks over its own rows and its own part of the vocabulary, and what devices
owe each other is sent before or after the walk: the head is gathered over the parameters' shards
once for both passes, its gradient is added up on the device and then reduce-scattered once. Parts
of the vocabulary, each with its own logsumexp Z_s and mean M_s, are joined by

    Z = log Σ_s exp(Z_s),      Σ_v p_v z_v = Σ_s exp(Z_s − Z) M_s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxalign.parallel.sharding import mesh_axes

Entropy = Literal["none", "value", "gradient"]
"""Whether entropies are computed, and whether a gradient flows through them: that is a second pass
over the logits of the backward pass."""

Finish = Callable[[jax.Array], jax.Array]
"""What a model does to its logits, elementwise (a soft-cap); hashable, so that jit can cache."""


def identity(logits: jax.Array) -> jax.Array:
    """Logits as they are."""
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
    wanted: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and, if asked for, the entropy.

    Args:
      chunk: positions of every row that are computed at a time; divides N.
      entropy: "none": the second result is 0; "value": it is computed, and no gradient flows
        through it; "gradient".
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_total(
    chunk: int,
    entropy: bool,
    finish: Finish,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    temperature: jax.Array,
    wanted: jax.Array | None,
    weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Σ weights · log p(target), and what is summed.

    A gradient flows to `hidden` and `head`, and through the sum alone: what else is returned is to
    be looked at.

    Args:
      chunk, finish, hidden, head, targets, temperature, wanted: as for `fused_logprobs`.
      entropy: whether entropies are computed; else they are 0.
      weights: float32 `[R, N]`; 0 from `wanted` on.

    Returns:
      The sum, float32; log-probabilities and entropies, two float32 `[R, N]`.
    """
    args = (hidden, head, targets, temperature, wanted)
    logprobs, entropies = _forward(chunk, "value" if entropy else "none", finish, *args)[0]
    return jnp.sum(weights * logprobs), logprobs, entropies


class _Cut(NamedTuple):
    """How the work is cut up over the mesh in context; mesh axes, none of them where it is not.

    Attributes:
      rows: that rows are split over.
      vocabulary: that columns of the head are.
      embed: those of `rows` that the head's rows lie over between steps.
    """

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    def run(self, work: Callable[..., Any], kinds: str, made: str, *args: Any) -> Any:
        """Runs `work` on each device with its part of every argument.

        Args:
          work: the function.
          kinds: a letter for each argument: r: its first axis is rows; h: a head, or its gradient,
            as it lies between steps; g: a head, gathered but for the vocabulary; s: the same on
            every device.
          made: the same of its results.
          *args: the arguments.
        """
        if not self.rows and not self.vocabulary:
            return work(*args)
        columns = self.vocabulary or None
        specs = {
            "r": PartitionSpec(self.rows or None),
            "h": PartitionSpec(self.embed or None, columns),
            "g": PartitionSpec(None, columns),
            "s": PartitionSpec(),
        }
        into, out = (tuple(specs[kind] for kind in told) for told in (kinds, made))
        # What is whole on several devices is computed alike on all of them; nothing checks it.
        return jax.shard_map(work, in_specs=into, out_specs=out, check_vma=False)(*args)


def _cut(lines: int, width: int, vocabulary: int) -> _Cut:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return _Cut()

    def over(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        names = tuple(name for name in names if mesh.shape[name] > 1)
        parts = 1
        for name in names:
            parts *= mesh.shape[name]
        return () if size % parts else names

    axes = functools.partial(mesh_axes, mesh=mesh)
    rows = over((*axes("length"), *axes("rows")), lines)
    embed = over(tuple(name for name in axes("embed") if name in rows), width)
    # Parts of the vocabulary are joined between devices that hold the same rows.
    columns = tuple(name for name in axes("vocab") if name not in rows)
    return _Cut(rows, over(columns, vocabulary), embed)


def vocabulary_shards(lines: int, vocabulary: int) -> int:
    """Over how many devices of the mesh in context the head's V columns are split."""
    mesh, cut = jax.sharding.get_abstract_mesh(), _cut(lines, 1, vocabulary)
    return math.prod(mesh.shape[name] for name in cut.vocabulary)


def _logits(
    finish: Finish, hidden: jax.Array, head: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Logits of a chunk, and how a gradient comes back through `finish` and the temperature."""
    raw = jnp.matmul(hidden, head, preferred_element_type=jnp.float32).astype(jnp.float32)
    finished, back = jax.vjp(finish, raw)
    return finished / temperature, lambda g: back(g / temperature)[0]


def _forward(
    chunk: int, entropy: Entropy, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, wanted: jax.Array | None,
):  # fmt: skip
    cut = _cut(hidden.shape[0], *head.shape)
    work = functools.partial(_read, chunk, entropy, finish, cut)
    args = (hidden, head, targets, temperature, wanted)
    chosen, logz, mean, whole = cut.run(work, "rhrss", "rrrg", *args)
    saved = (hidden, whole, *args[2:], logz, mean)
    return (chosen - logz, mean if entropy == "none" else logz - mean), saved


def _read(
    chunk: int, entropy: Entropy, finish: Finish, cut: _Cut, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, wanted: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """One device's z_y, logsumexp(z) and Σ p·z, joined with those of the other parts of the
    vocabulary; and the gathered head, for the backward pass."""
    zeros, shared = jnp.zeros(targets.shape, jnp.float32), cut.vocabulary
    if cut.embed:
        head = jax.lax.all_gather(head, cut.embed, axis=0, tiled=True)
    columns, first = head.shape[1], _first(head, shared)

    def one(i: jax.Array, done: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        part = functools.partial(_part, i, chunk)
        logits, _ = _logits(finish, part(hidden), head, temperature)
        logz = jax.nn.logsumexp(logits, axis=-1)
        column = part(targets) - first
        chosen = jnp.take_along_axis(logits, column[..., None], axis=-1, mode="clip")[..., 0]
        if shared:
            chosen = jnp.where((column >= 0) & (column < columns), chosen, 0.0)
        results = [chosen, logz]
        if entropy != "none":
            results.append(jnp.sum(jnp.exp(logits - logz[..., None]) * logits, axis=-1))
        put = functools.partial(_put, i, chunk)
        return tuple(map(put, done, results))

    start = (zeros,) * (2 if entropy == "none" else 3)
    count = _count(wanted, targets.shape[1], chunk)
    chosen, logz, *mean = jax.lax.fori_loop(0, count, one, start)
    mean = zeros if entropy == "none" else mean[0]
    if not shared:
        return chosen, logz, mean, head
    top = jax.lax.pmax(logz, shared)
    joined = top + jnp.log(jax.lax.psum(jnp.exp(logz - top), shared))
    if entropy != "none":
        mean = jax.lax.psum(jnp.exp(logz - joined) * mean, shared)
    if wanted is not None:
        joined = jnp.where(jnp.arange(targets.shape[1])[None] < count * chunk, joined, 0.0)
    return jax.lax.psum(chosen, shared), joined, mean, head


def _backward(chunk: int, entropy: Entropy, finish: Finish, saved, gradients):
    hidden, head = saved[:2]
    cut = _cut(hidden.shape[0], *head.shape)
    work = functools.partial(_differentiate, chunk, entropy, finish, cut)
    to_hidden, to_head = cut.run(work, "rgrssrrrr", "rh", *saved, *gradients)
    return to_hidden, to_head.astype(head.dtype), None, None, None


def _differentiate(
    chunk: int, entropy: Entropy, finish: Finish, cut: _Cut, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, wanted: jax.Array | None, logz: jax.Array,
    mean: jax.Array, to_logprobs: jax.Array, to_entropy: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One device's part of the gradients, added up with those of the others."""
    vocabulary = jnp.arange(head.shape[1], dtype=targets.dtype)[None]
    vocabulary += _first(head, cut.vocabulary)

    def one(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part = functools.partial(_part, i, chunk)
        states = part(hidden)
        logits, back = _logits(finish, states, head, temperature)
        probs = jnp.exp(logits - part(logz)[..., None])
        gradient = part(to_logprobs)[..., None]
        # Compared, not scattered: a scatter would be a second pass over all logits.
        to_logits = jnp.where(vocabulary == part(targets)[..., None], gradient, 0.0)
        to_logits -= probs * gradient
        if entropy == "gradient":
            to_logits -= part(to_entropy)[..., None] * probs * (logits - part(mean)[..., None])
        to_logits = back(to_logits).astype(hidden.dtype)
        return _come_back(i, chunk, states, head, to_logits, done)

    start = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    count = _count(wanted, targets.shape[1], chunk)
    to_hidden, to_head = jax.lax.fori_loop(0, count, one, start)
    if cut.vocabulary:
        to_hidden = jax.lax.psum(to_hidden, cut.vocabulary)
    return to_hidden, _sum_head(to_head, cut)


def _come_back(
    i: jax.Array, chunk: int, states: jax.Array, head: jax.Array, to_logits: jax.Array,
    done: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """A chunk's share of the gradients of hidden states and head."""
    to_hidden, to_head = done
    to_hidden = _put(i, chunk, to_hidden, jnp.matmul(to_logits, head.T))
    to_head += jnp.matmul(states.T, to_logits, preferred_element_type=jnp.float32)
    return to_hidden, to_head


def _sum_head(to_head: jax.Array, cut: _Cut) -> jax.Array:
    """The gradient of the head, added up over devices and laid out as the head is."""
    if cut.embed:
        to_head = jax.lax.psum_scatter(to_head, cut.embed, scatter_dimension=0, tiled=True)
    rest = tuple(name for name in cut.rows if name not in cut.embed)
    to_head = jax.lax.psum(to_head, rest) if rest else to_head
    if cut.rows:
        # The TPU compiler moves sums over devices out of a loop over micro-batches, and fails where
        # their results are converted before they are added up.
        to_head = jax.lax.optimization_barrier(to_head)
    return to_head


class _Ahead(NamedTuple):
    """Gradients of the sum, but for the factor that comes from outside."""

    hidden: jax.Array
    head: jax.Array


def _total_forward(
    chunk: int, entropy: bool, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, wanted: jax.Array | None, weights: jax.Array,
):  # fmt: skip
    cut = _cut(hidden.shape[0], *head.shape)
    args = (hidden, head, targets, temperature, wanted)
    if cut.vocabulary:  # the logsumexp is known when all parts of the vocabulary have been walked
        kind = "value" if entropy else "none"
        (logprobs, entropies), saved = _forward(chunk, kind, finish, *args)
        return (jnp.sum(weights * logprobs), logprobs, entropies), (saved, weights)
    work = functools.partial(_read_and_differentiate, chunk, entropy, finish, cut)
    made = cut.run(work, "rhrssr", "rrrh", *args, weights)
    logprobs, entropies, to_hidden, to_head = made
    saved = _Ahead(to_hidden, to_head), jnp.zeros((), head.dtype)
    return (jnp.sum(weights * logprobs), logprobs, entropies), saved


def _total_backward(chunk: int, entropy: bool, finish: Finish, saved, gradients):
    factor, (made, other) = gradients[0], saved
    if not isinstance(made, _Ahead):
        each = factor * other, jnp.zeros_like(other)
        return (*_backward(chunk, "none", finish, made, each), None)
    to_hidden = (made.hidden * factor).astype(made.hidden.dtype)
    return to_hidden, (made.head * factor).astype(other.dtype), None, None, None, None


def _read_and_differentiate(
    chunk: int, entropy: bool, finish: Finish, cut: _Cut, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, wanted: jax.Array | None, weights: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """One device's log p, entropy, and gradients of Σ w·log p, of its rows."""
    zeros = jnp.zeros(targets.shape, jnp.float32)
    if cut.embed:
        head = jax.lax.all_gather(head, cut.embed, axis=0, tiled=True)
    vocabulary = jnp.arange(head.shape[1], dtype=targets.dtype)[None]

    def one(i: jax.Array, done: tuple[Any, Any]) -> tuple[Any, Any]:
        seen, gradients = done
        part = functools.partial(_part, i, chunk)
        states, column, weight = part(hidden), part(targets)[..., None], part(weights)[..., None]
        logits, back = _logits(finish, states, head, temperature)
        logz = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, column, axis=-1, mode="clip")[..., 0]
        probs = jnp.exp(logits - logz[..., None])
        results = [chosen - logz]
        if entropy:
            results.append(logz - jnp.sum(probs * logits, axis=-1))
        to_logits = jnp.where(vocabulary == column, weight, 0.0) - probs * weight
        to_logits = back(to_logits).astype(hidden.dtype)
        gradients = _come_back(i, chunk, states, head, to_logits, gradients)
        return tuple(map(functools.partial(_put, i, chunk), seen, results)), gradients

    start = (jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    count = _count(wanted, targets.shape[1], chunk)
    seen, (to_hidden, to_head) = jax.lax.fori_loop(
        0, count, one, ((zeros,) * (2 if entropy else 1), start)
    )
    return seen[0], seen[1] if entropy else zeros, to_hidden, _sum_head(to_head, cut)


def _first(head: jax.Array, shared: tuple[str, ...]) -> jax.Array | int:
    """The first word of this device's part of the vocabulary."""
    return jax.lax.axis_index(shared) * head.shape[1] if shared else 0


def _part(i: jax.Array, chunk: int, x: jax.Array) -> jax.Array:
    """A chunk of every row, the rows end to end: sums over the last axis of `[1, N, V]` take XLA's
    CPU compiler many times those of `[N, V]`."""
    part = jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, axis=1)
    return part.reshape(-1, *x.shape[2:])


def _put(i: jax.Array, chunk: int, old: jax.Array, new: jax.Array) -> jax.Array:
    """`old` with what `_part` takes replaced."""
    new = new.reshape(old.shape[0], chunk, *old.shape[2:])
    return jax.lax.dynamic_update_slice_in_dim(old, new, i * chunk, axis=1)


def _count(wanted: jax.Array | None, length: int, chunk: int) -> jax.Array | int:
    return length // chunk if wanted is None else (wanted + chunk - 1) // chunk


fused_logprobs.defvjp(_forward, _backward)
fused_total.defvjp(_total_forward, _total_backward)
