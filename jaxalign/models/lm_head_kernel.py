"""Head and log-softmax in one, chunk by chunk, with a backward pass of its own.

For hidden states h `[R, N, D]`, head W `[D, V]` and targets y: with z = finish(h·W)/τ,

    log p(y) = z_y − logsumexp(z),      H = logsumexp(z) − Σ_v p_v z_v.

Neither pass keeps logits: the forward pass keeps logsumexp and Σ p·z of each position, from which
the backward pass forms the gradient of a recomputed chunk,

    ∂/∂z = g·(onehot(y) − p) − e·p·(z − Σ p·z),

with g and e the incoming gradients of log p(y) and H. Valid positions come first in every row, and
chunks past the last of them are skipped at run time: the cost grows with trained positions only.

Of a sum Σ w·log p(y) with weights that are known beforehand, ∂/∂z is known up to one factor as soon
as a chunk's logits are. `fused_total` forms the gradients of hidden states and head in the forward
pass, and forms no logits again (as Hsu et al. 2024, https://arxiv.org/abs/2410.10989, §3.2).

On a mesh every device runs over its own rows and its own columns of the head. No collective runs
inside the loop over chunks:

- Before it, the head is all-gathered over the mesh axes that shard its rows D (FSDP), once for both
  passes: D·V values, divided by the shards of the vocabulary.
- After the forward loop, z_y, logsumexp and Σ p·z of each position are all-reduced over the shards
  of the vocabulary, if there are several.
- After the backward loop, the float32 gradient of the head is reduce-scattered over the axes of the
  all-gather, and all-reduced over the other axes that shard rows (data). The gradient of hidden
  states is all-reduced over the shards of the vocabulary.

Parts s of the vocabulary, each with its own logsumexp Z_s and mean M_s, are joined by

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
    num_valid: jax.Array | None,
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
      num_valid: int32 scalar, valid positions of the row that has most; positions from here on are
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
    """Σ weights · log p(target), and what is summed.

    A gradient flows to `hidden` and `head`, and through the sum only.

    Args:
      chunk, finish, hidden, head, targets, temperature, num_valid: as for `fused_logprobs`.
      entropy: whether entropies are computed; else they are 0.
      weights: float32 `[R, N]`; 0 from `num_valid` on.

    Returns:
      The sum, float32; log-probabilities and entropies, two float32 `[R, N]`.
    """
    args = (hidden, head, targets, temperature, num_valid)
    logprobs, entropies = _forward(chunk, "value" if entropy else "none", finish, *args)[0]
    return jnp.sum(weights * logprobs), logprobs, entropies


class HeadSplit(NamedTuple):
    """How the mesh in context splits the head's work: names of mesh axes, () where it does not.

    Attributes:
      rows: mesh axes that shard the rows R of hidden states, targets and results.
      vocabulary: mesh axes that shard the head's columns V.
      embed: those of `rows` that shard the head's rows D between steps (FSDP).
    """

    rows: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    embed: tuple[str, ...] = ()

    @property
    def by_row(self) -> PartitionSpec:
        """Of arrays `[R, N, …]`."""
        return PartitionSpec(self.rows or None)

    @property
    def sharded_head(self) -> PartitionSpec:
        """Of the head `[D, V]` as parameters lie between steps, and of its gradient."""
        return PartitionSpec(self.embed or None, self.vocabulary or None)

    @property
    def gathered_head(self) -> PartitionSpec:
        """Of the head `[D, V]` with all its rows on every device."""
        return PartitionSpec(None, self.vocabulary or None)

    def operands(self, head: PartitionSpec) -> Operands:
        """The specs of `Operands`, with the head as given."""
        whole = PartitionSpec()
        return Operands(self.by_row, head, self.by_row, whole, whole)

    def run(self, function: Callable[..., Any], in_specs: Any, out_specs: Any, *args: Any) -> Any:
        """Runs a function on each device with its part of every argument.

        Args:
          function: gives parts of its results.
          in_specs: a `PartitionSpec` for each argument, or a pytree of them.
          out_specs: the same for its results.
          *args: whole arrays.
        """
        if not self.rows and not self.vocabulary:
            return function(*args)
        # Devices that hold the same part of an argument compute the same; nothing checks that.
        mapped = jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return mapped(*args)


class Operands(NamedTuple):
    """What both passes read; or the `PartitionSpec` of each.

    Attributes:
      hidden: `[R, N, D]`.
      head: `[D, V]`.
      targets: int32 `[R, N]`.
      temperature: float32 scalar.
      num_valid: int32 scalar or None, see `fused_logprobs`.
    """

    hidden: Any
    head: Any
    targets: Any
    temperature: Any
    num_valid: Any


class Normalizers(NamedTuple):
    """What the forward pass keeps of each position for the backward pass, float32 `[R, N]`.

    Attributes:
      logz: logsumexp(z) over the whole vocabulary.
      mean: Σ_v p_v z_v, or 0 without entropy.
    """

    logz: Any
    mean: Any


def head_split(rows: int, width: int, vocabulary: int) -> HeadSplit:
    """How the mesh in context splits a head `[D, V]` and R rows; axes that do not divide are left.

    Args:
      rows: R.
      width: D.
      vocabulary: V.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return HeadSplit()

    def dividing(names: tuple[str, ...], size: int) -> tuple[str, ...]:
        names = tuple(name for name in names if mesh.shape[name] > 1)
        return () if size % math.prod(mesh.shape[name] for name in names) else names

    axes = functools.partial(mesh_axes, mesh=mesh)
    row_axes = dividing((*axes("length"), *axes("rows")), rows)
    embed_axes = dividing(tuple(name for name in axes("embed") if name in row_axes), width)
    # Parts of the vocabulary are joined between devices that hold the same rows.
    vocabulary_axes = tuple(name for name in axes("vocab") if name not in row_axes)
    return HeadSplit(row_axes, dividing(vocabulary_axes, vocabulary), embed_axes)


def vocabulary_shards(rows: int, vocabulary: int) -> int:
    """Over how many devices of the mesh in context the head's V columns are split."""
    mesh, split = jax.sharding.get_abstract_mesh(), head_split(rows, 1, vocabulary)
    return math.prod(mesh.shape[name] for name in split.vocabulary)


def _logits(
    finish: Finish, hidden: jax.Array, head: jax.Array, temperature: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Logits `[P, V]` of hidden states `[P, D]`, and how a gradient goes back to `hidden·head`."""
    raw = jnp.matmul(hidden, head, preferred_element_type=jnp.float32).astype(jnp.float32)
    finished, pullback = jax.vjp(finish, raw)
    return finished / temperature, lambda g: pullback(g / temperature)[0]


Saved = tuple[Operands, Normalizers]


def _forward(
    chunk: int, entropy: Entropy, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, num_valid: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], Saved]:  # fmt: skip
    split = head_split(hidden.shape[0], *head.shape)
    operands = Operands(hidden, head, targets, temperature, num_valid)
    target_logits, normalizers, gathered = split.run(
        functools.partial(_forward_shard, chunk, entropy, finish, split),
        (split.operands(split.sharded_head),),
        (split.by_row, Normalizers(split.by_row, split.by_row), split.gathered_head),
        operands,
    )
    logz, mean = normalizers
    results = target_logits - logz, mean if entropy == "none" else logz - mean
    return results, (operands._replace(head=gathered), normalizers)


def _forward_shard(
    chunk: int, entropy: Entropy, finish: Finish, split: HeadSplit, operands: Operands
) -> tuple[jax.Array, Normalizers, jax.Array]:
    """One device's forward pass.

    Returns:
      (z_y `[R, N]`, normalizers, the gathered head `[D, V]` for the backward pass), with logits of
      its part of the vocabulary joined with those of the other parts.
    """
    hidden, head, targets, temperature, num_valid = operands
    zeros = jnp.zeros(targets.shape, jnp.float32)  # [R, N]
    if split.embed:
        head = jax.lax.all_gather(head, split.embed, axis=0, tiled=True)  # [D / n, V] → [D, V]
    columns, first = head.shape[1], _first_column(head, split)

    def chunk_step(i: jax.Array, results: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        take = functools.partial(_take_chunk, i, chunk)
        logits, _ = _logits(finish, take(hidden), head, temperature)  # [R·c, D] → [R·c, V]
        logz = jax.nn.logsumexp(logits, axis=-1)  # [R·c]
        column = take(targets) - first  # [R·c]
        chosen = jnp.take_along_axis(logits, column[..., None], axis=-1, mode="clip")[..., 0]
        if split.vocabulary:  # targets in other parts of the vocabulary
            chosen = jnp.where((column >= 0) & (column < columns), chosen, 0.0)
        new = [chosen, logz]
        if entropy != "none":
            new.append(jnp.sum(jnp.exp(logits - logz[..., None]) * logits, axis=-1))
        put = functools.partial(_put_chunk, i, chunk)
        return tuple(map(put, results, new))

    start = (zeros,) * (2 if entropy == "none" else 3)
    count = _num_chunks(num_valid, targets.shape[1], chunk)
    chosen, logz, *mean = jax.lax.fori_loop(0, count, chunk_step, start)
    mean = zeros if entropy == "none" else mean[0]
    if not split.vocabulary:
        return chosen, Normalizers(logz, mean), head
    # Z = log Σ_s exp(Z_s), with the largest Z_s taken out; then Σ p·z = Σ_s exp(Z_s − Z) M_s.
    top = jax.lax.pmax(logz, split.vocabulary)
    joined = top + jnp.log(jax.lax.psum(jnp.exp(logz - top), split.vocabulary))
    if entropy != "none":
        mean = jax.lax.psum(jnp.exp(logz - joined) * mean, split.vocabulary)
    if num_valid is not None:
        joined = jnp.where(jnp.arange(targets.shape[1])[None] < count * chunk, joined, 0.0)
    return jax.lax.psum(chosen, split.vocabulary), Normalizers(joined, mean), head


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
        (split.operands(split.gathered_head), Normalizers(by_row, by_row), by_row, by_row),
        (by_row, split.sharded_head),
        operands, normalizers, *gradients,
    )  # fmt: skip
    return to_hidden, to_head.astype(head.dtype), None, None, None


def _backward_shard(
    chunk: int, entropy: Entropy, finish: Finish, split: HeadSplit, operands: Operands,
    normalizers: Normalizers, to_logprobs: jax.Array, to_entropy: jax.Array,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """One device's gradients of its hidden states `[R, N, D]` and of its part of the head."""
    (hidden, head, targets, temperature, num_valid), (logz, mean) = operands, normalizers
    vocabulary = jnp.arange(head.shape[1], dtype=targets.dtype)[None]  # [1, V]
    vocabulary += _first_column(head, split)

    def chunk_step(i: jax.Array, sums: HeadGradients) -> HeadGradients:
        take = functools.partial(_take_chunk, i, chunk)
        states = take(hidden)  # [R·c, D]
        logits, pullback = _logits(finish, states, head, temperature)  # [R·c, V]
        probs = jnp.exp(logits - take(logz)[..., None])
        gradient = take(to_logprobs)[..., None]  # [R·c, 1]
        # ∂/∂z = g·(onehot(y) − p) − e·p·(z − Σ p·z). The one-hot is a comparison: a scatter would
        # be a second pass over all logits.
        to_logits = jnp.where(vocabulary == take(targets)[..., None], gradient, 0.0)
        to_logits -= probs * gradient
        if entropy == "gradient":
            to_logits -= take(to_entropy)[..., None] * probs * (logits - take(mean)[..., None])
        to_logits = pullback(to_logits).astype(hidden.dtype)
        return _add_gradients(i, chunk, states, head, to_logits, sums)

    start = HeadGradients(jnp.zeros_like(hidden), jnp.zeros(head.shape, jnp.float32))
    count = _num_chunks(num_valid, targets.shape[1], chunk)
    to_hidden, to_head = jax.lax.fori_loop(0, count, chunk_step, start)
    if split.vocabulary:
        to_hidden = jax.lax.psum(to_hidden, split.vocabulary)
    return to_hidden, _reduce_head_gradient(to_head, split)


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
    """Adds a chunk's share: states `[R·c, D]`, gradient of its logits `[R·c, V]`."""
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
        # XLA's TPU compiler moves sums over devices out of a loop over micro-batches, and fails
        # where their results are converted before they are added up.
        to_head = jax.lax.optimization_barrier(to_head)
    return to_head


def _total_forward(
    chunk: int, entropy: bool, finish: Finish, hidden: jax.Array, head: jax.Array,
    targets: jax.Array, temperature: jax.Array, num_valid: jax.Array | None, weights: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Any]:  # fmt: skip
    """The sum and its terms; and the gradients, but for the factor that comes from outside."""
    split = head_split(hidden.shape[0], *head.shape)
    operands = Operands(hidden, head, targets, temperature, num_valid)
    if split.vocabulary:  # the logsumexp is known only after all parts of the vocabulary
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
        states, column, weight = take(hidden), take(targets)[..., None], take(weights)[..., None]
        logits, pullback = _logits(finish, states, head, temperature)  # [R·c, D] → [R·c, V]
        logz = jax.nn.logsumexp(logits, axis=-1)  # [R·c]
        chosen = jnp.take_along_axis(logits, column, axis=-1, mode="clip")[..., 0]
        probs = jnp.exp(logits - logz[..., None])
        new = [chosen - logz]
        if entropy:
            new.append(logz - jnp.sum(probs * logits, axis=-1))
        to_logits = jnp.where(vocabulary == column, weight, 0.0) - probs * weight  # w·(onehot − p)
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
    """The first token of this device's part of the vocabulary."""
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
