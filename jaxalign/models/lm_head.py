"""Log-probabilities of target tokens from hidden states.

`target_logprobs` is the only training code that computes logits, one chunk of positions at a time:
the whole `[B, T, V]` never exists, forward or backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import keep
from jaxalign.models.backend import backend, record_choice
from jaxalign.models.base import LanguageModel
from jaxalign.models.lm_head_kernel import (
    Entropy,
    Finish,
    fused_logprobs,
    fused_total,
    identity,
)
from jaxalign.models.lm_head_split import vocabulary_shards
from jaxalign.parallel.shard_map import fold_length, unfold_length
from jaxalign.parallel.sharding import axis_shards, constrain, row_shards
from jaxalign.types import Array, Params


@overload
def target_logprobs(
    model: LanguageModel, params: Params, hidden: jax.Array, targets: Array,
    temperature: Any = 1.0, *, entropy: Literal[False] = False, entropy_gradient: bool = True,
    mask: Array | None = None, chunk: int | None = None,
) -> jax.Array: ...  # fmt: skip


@overload
def target_logprobs(
    model: LanguageModel, params: Params, hidden: jax.Array, targets: Array,
    temperature: Any = 1.0, *, entropy: Literal[True], entropy_gradient: bool = True,
    mask: Array | None = None, chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def target_logprobs(
    model: LanguageModel,
    params: Params,
    hidden: jax.Array,
    targets: Array,
    temperature: Any = 1.0,
    *,
    entropy: bool = False,
    entropy_gradient: bool = True,
    mask: Array | None = None,
    chunk: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Log-probability of each target: `z_y − logsumexp(z)` with `z = hidden · head / temperature`.

    Args:
      model: any object with `head(params) -> [D, V]`. If it also has `finish_logits`, logits pass
        through it (soft-capping) before the temperature.
      params: its parameters.
      hidden: `[B, T, D]`.
      targets: int `[B, T]`.
      temperature: divides the logits; positive; may be traced. No gradient flows to it.
      entropy: also return the entropy `logsumexp(z) − Σ softmax(z)·z` of each distribution, in
        nats.
      entropy_gradient: whether a gradient flows through the entropy. If not, entropies cost nothing
        in the backward pass.
      mask: bool `[B, T]`, the positions that count. The others give 0, and the head skips them
        (except in its last chunk). None: all.
      chunk: positions of every row computed at a time; None: chosen by platform, vocabulary and
        memory, see `head_chunks`. Memory grows with it; results do not depend on it.

    Returns:
      float32 `[B, T]`, unreduced, in nats; with `entropy`, a pair of such arrays.
    """
    inputs = _head_inputs(model, params, hidden, targets, mask, chunk)
    kind: Entropy = "none"
    if entropy:
        kind = "gradient" if entropy_gradient else "value"
    temperature = jax.lax.stop_gradient(jnp.asarray(temperature, jnp.float32))
    logprobs, entropies = fused_logprobs(
        inputs.chunk,
        kind,
        inputs.finish,
        inputs.hidden,
        inputs.head,
        inputs.targets,
        temperature,
        inputs.num_valid,
    )
    if entropy:
        return inputs.back(logprobs), inputs.back(entropies)
    return inputs.back(logprobs)


class TargetSum(NamedTuple):
    """The result of `target_sum`.

    Attributes:
      total: float32 scalar, Σ w · log π over the mask, in nats.
      logprobs: float32 `[B, T]`, log π; 0 outside the mask. No gradient flows
        through it.
      entropy: float32 `[B, T]`, in nats, or None. No gradient flows through it.
    """

    total: jax.Array
    logprobs: jax.Array
    entropy: jax.Array | None


def target_sum(
    model: LanguageModel, params: Params, hidden: jax.Array, targets: Array, mask: Array,
    *, weights: Array | None = None, entropy: bool = False, chunk: int | None = None,
) -> TargetSum:  # fmt: skip
    """Σ_t m_t · w_t · log π(y_t), for losses that equal this sum up to a factor.

    It equals the (weighted) sum of `target_logprobs`, but needs three matrix products with the head
    instead of four. The gradient of the sum is known up to a factor while a chunk's logits exist,
    so the backward pass need not recompute logits (unless the vocabulary is split over devices).

    Args:
      model, params, hidden, targets, chunk: as for `target_logprobs`.
      mask: bool `[B, T]`, m.
      weights: float32 `[B, T]`, w; None: 1 each. No gradient flows to them.
      entropy: also return the entropies.
    """
    inputs = _head_inputs(model, params, hidden, targets, mask, chunk)
    mask = jnp.asarray(mask, bool)
    factors = inputs.put(mask.astype(jnp.float32) if weights is None else keep(weights, mask))
    total, logprobs, entropies = fused_total(
        inputs.chunk,
        entropy,
        inputs.finish,
        inputs.hidden,
        inputs.head,
        inputs.targets,
        jnp.float32(1),
        inputs.num_valid,
        factors,
    )
    logprobs, entropies = jax.lax.stop_gradient((logprobs, entropies))
    return TargetSum(total, inputs.back(logprobs), inputs.back(entropies) if entropy else None)


class _HeadInputs(NamedTuple):
    """Positions in the form for the fused head.

    There are L lines of N positions. On one device a single line holds all rows, B·T positions.
    Over several devices a line is a row, or a device's part of one, so that every position stays on
    its device.

    Attributes:
      hidden: `[L, N, D]`, valid positions first in each line.
      targets: `[L, N]`.
      head: `[D, V]`.
      num_valid: the largest number of valid positions in a line; None: all.
      chunk: positions of a line at a time.
      finish: the model's function of its logits.
      put: maps another `[B, T]` to `[L, N]`.
      back: maps `[L, N]` to `[B, T]`, with 0 outside the mask.
    """

    hidden: jax.Array
    targets: jax.Array
    head: jax.Array
    num_valid: jax.Array | None
    chunk: int
    finish: Finish
    put: Callable[[jax.Array], jax.Array]
    back: Callable[[jax.Array], jax.Array]


def _head_inputs(
    model: LanguageModel, params: Params, hidden: jax.Array, targets: Array, mask: Array | None,
    chunk: int | None,
) -> _HeadInputs:  # fmt: skip
    rows, length, width = hidden.shape
    targets = jnp.asarray(targets, jnp.int32)
    if targets.shape != (rows, length):
        raise ValueError(f"targets {targets.shape} do not fit hidden {hidden.shape}")
    head = model.head(params).astype(hidden.dtype)
    parts = row_shards() * axis_shards("length")
    lines = fold_length(targets).shape
    shape = lines if parts > 1 else (1, rows * length)
    hidden = fold_length(hidden).reshape(*shape, width)  # [B, T, D] → [L, N, D]
    num_valid = order = valid = None
    if mask is not None:
        valid = fold_length(jnp.asarray(mask, bool)).reshape(shape)
        order = jnp.argsort(~valid, axis=1, stable=True)  # [L, N], valid positions first
        num_valid = jnp.max(jnp.sum(valid, axis=1, dtype=jnp.int32))
        hidden = _reorder(jnp.where(valid[..., None], hidden, 0), order)
    chunk = None if chunk is None else max(1, chunk * rows // shape[0])
    chunk, count = head_chunks(
        shape[0], shape[1], head.shape[1], parts, chunk, masked=mask is not None
    )
    record_choice(f"head: {shape[0] * chunk:,} of {shape[0] * shape[1]:,} positions at a time")
    pad = count * chunk - shape[1]
    if pad:
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))

    def put(x: jax.Array) -> jax.Array:
        x = fold_length(x).reshape(shape)
        if order is not None:
            x = jnp.take_along_axis(x, order, axis=1)
        return jnp.pad(x, ((0, 0), (0, pad))) if pad else x

    def back(x: jax.Array) -> jax.Array:
        x = x[:, : shape[1]]
        if order is not None and valid is not None:
            x = jnp.take_along_axis(x, jnp.argsort(order, axis=1), axis=1)
            x = jnp.where(valid, x, 0.0)
        if parts > 1:
            return constrain(unfold_length(x, length), "rows length")
        return constrain(x.reshape(rows, length), "rows length")

    finish = getattr(model, "finish_logits", identity)
    return _HeadInputs(hidden, put(targets), head, num_valid, chunk, finish, put, back)


def head_chunks(
    lines: int, positions: int, vocabulary: int, parts: int, chunk: int | None = None, *,
    masked: bool = True,
) -> tuple[int, int]:  # fmt: skip
    """How the head splits its positions into chunks.

    On a device, a chunk of P positions reads the head `[D, V]` once and holds float32 logits `[P, V
    / n]`, for n shards of the vocabulary. `Backend.head_*` limit P by platform, by vocabulary and
    by the device's memory: on an H100 or a v5p, P = 4,096 at a vocabulary of 128k.

    Args:
      lines: rows, or parts of rows, on all devices.
      positions: the positions of a line.
      vocabulary: V.
      parts: the number of devices over which the lines are split.
      chunk: positions of a line at a time, if the caller chooses.
      masked: whether only some positions count; chunks after the last of these are skipped.

    Returns:
      (positions of a line in a chunk, number of chunks), for the mesh in context.
    """
    multiple = 1
    if chunk is None:
        platform = backend()
        multiple = platform.head_multiple
        columns = math.ceil(vocabulary / vocabulary_shards(lines, vocabulary))
        limits = [platform.head_logit_bytes // 4 * parts // (lines * columns)]
        if platform.head_positions is not None:
            limits.append(platform.head_positions * parts // lines)
        row = platform.head_masked_row_positions if masked else platform.head_row_positions
        if row is not None:
            limits.append(row)
        chunk = max(1, min(limits))
        if chunk > multiple:
            chunk -= chunk % multiple
    count = math.ceil(positions / chunk)
    if not masked:  # equal chunks: less padding
        chunk = math.ceil(positions / count / multiple) * multiple
    return min(chunk, positions), count


@jax.custom_vjp
def _reorder(x: jax.Array, order: jax.Array) -> jax.Array:
    """`x[b, order[b, t]]` for permutations; its gradient is also a gather, not a scatter."""
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _reorder_forward(x: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _reorder(x, order), order


def _reorder_backward(order: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return jnp.take_along_axis(gradient, jnp.argsort(order, axis=1)[..., None], axis=1), None


_reorder.defvjp(_reorder_forward, _reorder_backward)
