"""What is read from hidden states: log-probabilities of targets, and scalar scores.

`target_logprobs` is the only training code that sees the vocabulary, a chunk of positions at a
time: the whole `[B, T, V]` is never made, forward or backward.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from jaxalign.masked import last_index
from jaxalign.models.base import DecoderConfig, LanguageModel, ScalarModel
from jaxalign.models.decoder import Decoder
from jaxalign.sharding import constrain, mesh_of, param_shardings, row_shards
from jaxalign.types import Array, Params, TokenBatch, Weighted

CHUNK_LOGITS = 2**25
"""Logits a device holds at a time by default: 32 M, 128 MiB in float32."""


@overload
def target_logprobs(
    model: LanguageModel, params: Params, hidden: jax.Array, targets: Array,
    temperature: Any = 1.0, *, entropy: Literal[False] = False, chunk: int | None = None,
) -> jax.Array: ...  # fmt: skip


@overload
def target_logprobs(
    model: LanguageModel, params: Params, hidden: jax.Array, targets: Array,
    temperature: Any = 1.0, *, entropy: Literal[True], chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]: ...  # fmt: skip


def target_logprobs(
    model: LanguageModel,
    params: Params,
    hidden: jax.Array,
    targets: Array,
    temperature: Any = 1.0,
    *,
    entropy: bool = False,
    chunk: int | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Log-probability of each target: `z_y − logsumexp(z)` with `z = hidden · head / temperature`.

    Args:
      model: anything that offers `head(params) -> [D, V]`. If it also has `finish_logits`, logits
        pass through it (soft-capping) before the temperature.
      params: its parameters.
      hidden: `[B, T, D]`.
      targets: int `[B, T]`.
      temperature: divides the logits; positive; may be traced.
      entropy: also return the entropy `logsumexp(z) − Σ softmax(z)·z` of each distribution, in
        nats.
      chunk: positions computed at a time; by default as many as make `CHUNK_LOGITS` logits a
        device. Memory grows with it, results do not depend on it.

    Returns:
      float32 `[B, T]`, unreduced, in nats; with `entropy`, a pair of such.
    """
    rows, length, width = hidden.shape
    targets = jnp.asarray(targets)
    if targets.shape != (rows, length):
        raise ValueError(f"targets {targets.shape} do not fit hidden {hidden.shape}")
    head = model.head(params)
    finish = getattr(model, "finish_logits", None)
    if chunk is None:
        chunk = max(1, CHUNK_LOGITS * row_shards() // (rows * head.shape[1]))
    chunk = min(chunk, length)
    count = math.ceil(length / chunk)
    chunk = math.ceil(length / count)  # equal chunks: less padding
    head = head.astype(hidden.dtype)

    def one(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("btd,dv->btv", hidden, head, preferred_element_type=jnp.float32)
        logits = logits.astype(jnp.float32)
        logits = (logits if finish is None else finish(logits)) / temperature
        logz = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1, mode="clip")[..., 0]
        if not entropy:
            return chosen - logz, jnp.zeros_like(logz)
        mean_logit = jnp.sum(jnp.exp(logits - logz[..., None]) * logits, axis=-1)
        return chosen - logz, logz - mean_logit

    if count == 1:
        logprobs, entropies = jax.checkpoint(one)(hidden, targets)
    else:
        pad = count * chunk - length
        hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
        targets = jnp.pad(targets, ((0, 0), (0, pad)))
        split_hidden = jnp.moveaxis(hidden.reshape(rows, count, chunk, width), 1, 0)
        split_targets = jnp.moveaxis(targets.reshape(rows, count, chunk), 1, 0)
        body = jax.checkpoint(one, prevent_cse=False)
        _, (logprobs, entropies) = jax.lax.scan(
            lambda _, xs: (None, body(*xs)), None, (split_hidden, split_targets)
        )
        join = lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1)[:, :length]  # noqa: E731
        logprobs, entropies = join(logprobs), join(entropies)
    logprobs = constrain(logprobs, "rows length")
    return (logprobs, constrain(entropies, "rows length")) if entropy else logprobs


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A decoder with a scalar head instead of a vocabulary: reward model and critic.

    Attributes:
      base: the decoder; its output head is not used and not in the parameters.
    """

    base: Decoder

    @property
    def config(self) -> DecoderConfig:
        """The decoder's shape."""
        return self.base.config

    @property
    def shapes(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s."""
        shapes = {k: v for k, v in self.base.shapes.items() if k != "head"}
        kernel = jax.ShapeDtypeStruct((self.config.hidden_size, 1), jnp.float32)
        return shapes | {"score": {"kernel": kernel}}

    @property
    def axes(self) -> Params:
        """The parameter tree with the logical axes of each leaf."""
        axes = {k: v for k, v in self.base.axes.items() if k != "head"}
        return axes | {"score": {"kernel": "embed scalar"}}

    def apply(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
    ) -> jax.Array:
        """Hidden states `[B, T, D]`, as `Decoder.apply`."""
        return self.base.apply(params, inputs, positions, segment_ids, branch_ids)

    @property
    def extra_terms(self) -> tuple[str, ...]:
        """As `Decoder.extra_terms`."""
        return self.base.extra_terms

    def apply_with_losses(
        self,
        params: Params,
        inputs: Array,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        branch_ids: Array | None = None,
    ) -> tuple[jax.Array, dict[str, Weighted]]:
        """As `Decoder.apply_with_losses`."""
        return self.base.apply_with_losses(params, inputs, positions, segment_ids, branch_ids)

    def scores(self, params: Params, hidden: jax.Array) -> jax.Array:
        """The scalar at every position: `hidden · score`, float32 `[B, T]`."""
        kernel = params["score"]["kernel"].astype(jnp.float32)
        return jnp.einsum("btd,do->bto", hidden.astype(jnp.float32), kernel)[..., 0]


def with_scalar_head(model: Decoder, params: Params, key: jax.Array) -> tuple[Scorer, Params]:
    """Puts a fresh scalar head on a language model: the start of a reward model or critic.

    The head is N(0, 1/(D + 1)) without bias (Stiennon et al. 2020; Huang et al. 2024), so that
    first scores are of order one. The vocabulary head, where untied, is left out.

    Args:
      model: the language model.
      params: its parameters; shared, not copied.
      key: a PRNG key for the head.

    Returns:
      (scorer, parameters with `score/kernel` `[D, 1]`).
    """
    width = model.config.hidden_size
    kernel = jax.random.normal(key, (width, 1), jnp.float32) / math.sqrt(width + 1)
    scorer, mesh = Scorer(model), mesh_of(params)
    if mesh is not None:
        layout = param_shardings(scorer.axes["score"], mesh, scorer.shapes["score"])
        kernel = jax.device_put(kernel, layout["kernel"])
    kept = {k: v for k, v in params.items() if k != "head"}
    return scorer, kept | {"score": {"kernel": kernel}}


def pooled_scores(
    scorer: ScalarModel, params: Params, tokens: TokenBatch, count: int | None = None
) -> jax.Array:
    """The scalar at the last token of each sequence, the usual score of a reward model.

    Args:
      scorer: reward model.
      params: its parameters.
      tokens: `[B, T]`; padded on either side or packed.
      count: S, the largest number of sequences a row holds; None when each row is one sequence.

    Returns:
      float32 `[B]`, or `[B, S]` with `count`; meaningless finite values where there is none.
    """
    hidden = scorer.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
    values = scorer.scores(params, hidden)
    last = last_index(tokens.segment_ids, 1 if count is None else count)
    pooled = jnp.take_along_axis(values, last, axis=1)
    return pooled[:, 0] if count is None else pooled
