"""Sums, means and variances of the entries that a mask keeps: the only file that divides by a mask.

A batch has fixed shapes, so it holds entries that mean nothing: padding, prompts, empty slots. Two
rules keep them out. *Select before the arithmetic*: an entry outside the mask is replaced by 0
first, because NaN · 0 = NaN, in the value and in the gradient. *Divide late*: a part of a batch
returns a sum and its weight (`Weighted`), not a mean, so that parts can be added.

In every function, entries with a `True` (or non-zero) mask count, a mask has the shape of its
values, the arithmetic is float32 for any input type, and the result of an empty mask is 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.summation import exact_sum
from jaxalign.types import Array, Weighted

Axis = int | tuple[int, ...] | None


def as_float32(**arrays: Array) -> tuple[jax.Array, ...]:
    """Casts arrays that belong together to float32, in the order given.

    Raises:
      ValueError: their shapes differ: broadcasting here would hide a misalignment.
    """
    shapes = {name: jnp.shape(array) for name, array in arrays.items()}
    if len(set(shapes.values())) > 1:
        got = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"wanted arrays of one shape, got {got}; align them before the call")
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays.values())


def as_bool(mask: Array) -> jax.Array:
    """The mask as booleans: non-zero is True, whatever the mask's type (bool, int or float)."""
    return jnp.asarray(mask).astype(jnp.bool_)


def keep(x: Array, mask: Array) -> jax.Array:
    """`x` in float32 where the mask is True and 0 elsewhere; elsewhere the gradient is 0 too.

    Use it on the *inputs* of a loss: masking only the loss leaves 0 · NaN = NaN in the gradient.

    Raises:
      ValueError: `x` and `mask` differ in shape.
    """
    (x, _) = as_float32(x=x, mask=mask)
    return jnp.where(as_bool(mask), x, 0.0)


def weighted(values: Array, mask: Array, weights: Array | None = None) -> Weighted:
    """The sum of the kept values and their number, to be added up and divided once.

    Args:
      values: any shape.
      mask: the same shape.
      weights: w ≥ 0, the same shape: the result is then Σ w·x and Σ w; None: 1 each.

    Returns:
      `Weighted(total, weight)`, two float32 scalars.

    >>> weighted(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False])).mean()
    Array(1.5, dtype=float32)
    """
    if weights is None:
        return _weighted(values, mask, None)
    weights = keep(weights, mask)
    return Weighted(jnp.sum(weights * keep(values, mask)), jnp.sum(weights))


def masked_sum(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Σ x over the kept entries, over all axes or the given ones; float32."""
    return jnp.sum(keep(x, mask), axis=axis)


def masked_mean(x: Array, mask: Array, axis: Axis = None) -> jax.Array:
    """Σ x / n over the n kept entries, over all axes or the given ones; 0 if n = 0; float32."""
    return _weighted(x, mask, axis).mean()


def masked_var(x: Array, mask: Array, ddof: int = 0) -> jax.Array:
    """Σ (x − mean)² / (n − ddof) over the n kept entries of the whole array.

    Args:
      x: any shape.
      mask: the same shape.
      ddof: 0 for the biased variance, 1 for the unbiased one.

    Returns:
      A float32 scalar; 0 where n ≤ ddof.
    """
    centred = keep(keep(x, mask) - masked_mean(x, mask), mask)
    count = jnp.sum(as_bool(mask), dtype=jnp.float32)
    return Weighted(jnp.sum(jnp.square(centred)), count - ddof).mean()


def whiten(
    x: Array, mask: Array, *, shift_mean: bool = True, ddof: int = 0, eps: float = 1e-8
) -> jax.Array:
    """Scales the kept entries to variance 1: (x − mean) / √(var + eps).

    Mean and variance are over the whole array; under `jit` on a mesh that is the whole batch.

    Args:
      x: any shape.
      mask: the same shape.
      shift_mean: True gives mean 0 (advantages); False adds the mean back, so that only the scale
        changes (rewards, whose sign matters).
      ddof: the variance's ddof; 0 is ours, 1 is TRL's.
      eps: keeps a constant array finite.

    Returns:
      float32, the shape of `x`; 0 outside the mask.
    """
    kept = keep(x, mask)
    count = jnp.maximum(jnp.sum(as_bool(mask), dtype=jnp.float32), 1.0)
    mean = exact_sum(kept) / count
    # Centred twice: if the mean is large beside the spread, its rounding error is a visible part of
    # the spread, and would shift every entry by the same amount.
    centred = keep(kept - mean, mask)
    centred = keep(centred - exact_sum(centred) / count, mask)
    scaled = centred * jax.lax.rsqrt(masked_var(centred, mask, ddof) + eps)
    return keep(scaled if shift_mean else scaled + mean, mask)


def segment_sum(x: Array, segment_ids: Array, count: int) -> jax.Array:
    """Sums each document of a packed row: out[b, s] = Σ_t x[b, t] · [segment_ids[b, t] = s + 1].

    To sum part of each document only, clear the other ids:
    `segment_sum(logprobs, jnp.where(loss_mask, segment_ids, 0), count)`.

    Args:
      x: `[B, T]`.
      segment_ids: int `[B, T]`; 0 is padding, which is left out whatever its `x`.
      count: S, the largest number of documents in a row; ids above it are left out.

    Returns:
      float32 `[B, S]`, 0 for a document that the row does not have.
    """
    (x, _) = as_float32(x=x, segment_ids=segment_ids)
    # A comparison and a sum stay on the device that holds the row; a scatter may not. They add in
    # float32; a one-hot matrix product would round to bfloat16 on a TPU.
    return jnp.sum(jnp.where(_members(segment_ids, count), x[:, :, None], 0.0), axis=1)


def last_index(segment_ids: Array, count: int) -> jax.Array:
    """Where each document of a packed row ends.

    Args:
      segment_ids: int `[B, T]`, 0 on padding.
      count: S, how many documents a row has at most.

    Returns:
      int32 `[B, S]`, the position of the last token of documents 1 … S; 0 for a document that
      the row does not have.
    """
    position = jnp.arange(jnp.shape(segment_ids)[1], dtype=jnp.int32)[None, :, None]
    return jnp.max(jnp.where(_members(segment_ids, count), position, 0), axis=1)


def run_counts(mask: Array, segment_ids: Array, branch_ids: Array | None = None) -> jax.Array:
    """How many entries the mask has kept so far in each document of a row, including this entry.

    Args:
      mask: `[B, T]`.
      segment_ids: int `[B, T]`; a document is a run of equal ids.
      branch_ids: int `[B, T]`, or None; if given, a run also has one branch.

    Returns:
      float32 `[B, T]`, exact.
    """
    starts = _starts(segment_ids, branch_ids)
    return _running(as_bool(mask).astype(jnp.float32), starts, reverse=False)


def run_sum(x: Array, segment_ids: Array, branch_ids: Array | None = None) -> jax.Array:
    """Σ of `x` over each document of a row, at every position of the document.

    Unlike `segment_sum` it need not know the number of documents, and no data leaves the row's
    device. Zero the entries that do not count before the call.

    Args:
      x: `[B, T]`.
      segment_ids: int `[B, T]`; a document is a run of equal ids.
      branch_ids: int `[B, T]`, or None; if given, a run also has one branch.

    Returns:
      float32 `[B, T]`.
    """
    x = jnp.asarray(x, jnp.float32)
    starts = _starts(segment_ids, branch_ids)
    ends = jnp.concatenate([starts[:, 1:], jnp.ones_like(starts[:, :1])], axis=1)
    before = _running(x, starts, reverse=False)
    return before + _running(x, ends, reverse=True) - x


def _starts(segment_ids: Array, branch_ids: Array | None) -> jax.Array:
    """bool `[B, T]`: another document begins here."""
    changed = jnp.zeros(jnp.shape(segment_ids), bool)
    for ids in (segment_ids, branch_ids):
        if ids is not None:
            ids = jnp.asarray(ids)
            changed |= jnp.pad(ids[:, 1:] != ids[:, :-1], ((0, 0), (1, 0)))
    return changed.at[:, 0].set(True)


def _running(x: jax.Array, fresh: jax.Array, reverse: bool) -> jax.Array:
    """Running sums along a row that restart where `fresh` is True."""

    def add(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return left[0] | right[0], jnp.where(right[0], right[1], left[1] + right[1])

    return jax.lax.associative_scan(add, (fresh, x), axis=1, reverse=reverse)[1]


def _weighted(x: Array, mask: Array, axis: Axis) -> Weighted:
    return Weighted(masked_sum(x, mask, axis), jnp.sum(as_bool(mask), axis, dtype=jnp.float32))


def _members(segment_ids: Array, count: int) -> jax.Array:
    """bool `[B, T, S]`: token t belongs to document s + 1."""
    if count < 1:
        raise ValueError(f"count={count}: wanted the number of segments of a row, at least 1")
    ids = jnp.arange(1, count + 1, dtype=jnp.int32)
    return jnp.asarray(segment_ids)[:, :, None] == ids[None, None, :]
