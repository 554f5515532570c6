"""Load balancing of a mixture of experts (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).

With f_i the fraction of tokens sent to expert i, and P_i the mean probability the router gave it,

    L = E · Σ_i f_i · P_i        (their equations 4 to 6)

has its minimum, k with k experts per token, when all E experts are used equally. Both means are
over all layers and tokens, as in transformers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import keep, masked_mean
from jaxalign.types import Array


def load_balancing(logits: Array, top_k: int, mask: Array | None = None) -> jax.Array:
    """The loss over a whole batch, as transformers' `load_balancing_loss_func` computes it.

    It is a product of two means over the batch, so it depends on how the batch is split. Training
    therefore uses `document_balance`.

    Args:
      logits: the router's logits, `[L, N, E]`: layers, tokens, experts.
      top_k: experts per token.
      mask: bool `[N]`, which tokens count; None: all.

    Returns:
      A float32 scalar, from k to E · k.

    >>> load_balancing(jnp.zeros((1, 4, 2)).at[0, :2, 0].set(1.0).at[0, 2:, 1].set(1.0), 1)
    Array(1., dtype=float32)
    """
    probs = jax.nn.softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    chosen = jnp.sum(jax.nn.one_hot(jax.lax.top_k(probs, top_k)[1], probs.shape[-1]), axis=2)
    counts = jnp.ones(probs.shape[1:2], bool) if mask is None else jnp.asarray(mask, bool)
    counts = jnp.broadcast_to(counts[None, :, None], probs.shape)
    share = masked_mean(chosen, counts, (0, 1))
    return probs.shape[-1] * jnp.sum(share * masked_mean(probs, counts, (0, 1)))


def document_balance(probs: Array, chosen: Array, segment_ids: Array) -> jax.Array:
    """The loss of each document by itself, spread over its tokens.

    Entry t is `E · Σ_i f_i · p_{t,i}` with f of t's own document. Its sum over a document is the
    document's loss times its number of tokens, so that the mean over all tokens of a batch weighs
    documents by their length. Unlike the batch-wide loss, this does not depend on how documents are
    packed into rows or how rows are split into micro-batches. It asks for balance within each
    document, which is stricter than balance over the batch.

    Args:
      probs: float32 `[B, T, E]`, the router's probabilities, averaged over layers.
      chosen: float32 `[B, T, E]`, the fraction of layers in which a token took each expert.
      segment_ids: int `[B, T]`, 0 on padding.

    Returns:
      float32 `[B, T]`, unreduced; 0 on padding.

    >>> probs = jnp.array([[[0.75, 0.25], [0.25, 0.75]]])  # one document, its experts used alike
    >>> document_balance(probs, jnp.round(probs), jnp.ones((1, 2), jnp.int32))
    Array([[1., 1.]], dtype=float32)
    """
    segment_ids = jnp.asarray(segment_ids)
    same = (segment_ids[:, :, None] == segment_ids[:, None, :]).astype(jnp.float32)
    # By default TPUs would round the factors to bfloat16, which makes some counts inexact.
    highest = jax.lax.Precision.HIGHEST
    taken = jnp.einsum("bts,bse->bte", same, jnp.asarray(chosen), precision=highest)
    share = taken / jnp.sum(same, axis=2, keepdims=True)
    loss = probs.shape[-1] * jnp.sum(share * jnp.asarray(probs, jnp.float32), axis=-1)
    return keep(loss, segment_ids > 0)
