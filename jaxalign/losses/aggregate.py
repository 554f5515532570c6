"""How per-token losses become one number: whether every token or every answer weighs the same.

Rows may be padded or packed: an answer is the masked part of one document (segment) of a row, or of
one branch of it. Add up the returned `Weighted` sums and divide once, over the whole batch.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.losses.masked import as_bool, run_counts, run_sum
from jaxalign.losses.summation import exact_sum
from jaxalign.types import Array, TokenBatch, Weighted

AGGREGATIONS = ("token", "sequence", "constant")


def aggregate(values: Array, tokens: TokenBatch, how: str, max_new_tokens: int) -> Weighted:
    """Per-token values of answers as a sum and its weight.

    "token": Σ_i Σ_t ℓ / Σ_i |o_i|: every token weighs the same (Yu et al. 2025, DAPO, arXiv
    2503.14476, eq. 8). "sequence": 1/N Σ_i 1/|o_i| Σ_t ℓ: every answer weighs the same (Shao et al.
    2024, GRPO, arXiv 2402.03300, eq. 3). "constant": 1/(N·R) Σ_i Σ_t ℓ: every token weighs the
    same, however long the answers in the batch happen to be (Liu et al. 2025, Dr. GRPO, arXiv
    2503.20783).

    Args:
      values: ℓ, `[B, T]`.
      tokens: rows of N answers; `loss_mask` marks their tokens. An answer without a masked token
        is not counted.
      how: one of `AGGREGATIONS`.
      max_new_tokens: R, the longest possible answer.

    Returns:
      `Weighted`, whose parts add up over micro-batches.
    """
    mask = as_bool(tokens.loss_mask)
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    if how == "sequence":
        counts = run_sum(mask, tokens.segment_ids, tokens.branch_ids)
        values = values / jnp.maximum(counts, 1.0)
    return Weighted(exact_sum(values), aggregate_weight(tokens, how, max_new_tokens))


def aggregate_weight(tokens: TokenBatch, how: str, max_new_tokens: int) -> jax.Array:
    """The weight that `aggregate` gives: tokens, answers, or answers × R; float32 scalar."""
    check_aggregation(how)
    mask = as_bool(tokens.loss_mask)
    if how == "token":
        return jnp.sum(mask, dtype=jnp.float32)
    # An answer is counted at its first token.
    first = mask & (run_counts(mask, tokens.segment_ids, tokens.branch_ids) == 1)
    answers = jnp.sum(first, dtype=jnp.float32)
    return answers * max_new_tokens if how == "constant" else answers


def answer_mean(values: Array, tokens: TokenBatch) -> jax.Array:
    """The mean over an answer's tokens, at each of them: float32 `[B, T]`, 0 outside the mask.

    Of log π/π_old this is the log of the sequence's ratio in GSPO, (π(y|x)/π_old(y|x))^(1/|y|):
    Zheng et al. 2025 (arXiv 2507.18071), eq. 7.
    """
    mask = as_bool(tokens.loss_mask)
    values = jnp.where(mask, jnp.asarray(values, jnp.float32), 0.0)
    ids = (tokens.segment_ids, tokens.branch_ids)
    mean = run_sum(values, *ids) / jnp.maximum(run_sum(mask, *ids), 1.0)
    return jnp.where(mask, mean, 0.0)


def check_aggregation(how: str) -> None:
    """Raises ValueError for an aggregation that `aggregate` does not know."""
    if how not in AGGREGATIONS:
        raise ValueError(f"loss_aggregation={how!r}: wanted one of {', '.join(AGGREGATIONS)}")
