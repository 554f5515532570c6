"""How the reward model and DPO read a `PairBatch`: both sides of a pair in one forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.types import PairBatch, TokenBatch


def interleave(batch: PairBatch) -> TokenBatch:
    """Chosen and rejected as one `[2B, T]` batch: rows c0, r0, c1, r1, …

    Interleaved, not concatenated, so that both sides stay on the device that holds the pair.
    """

    def join(chosen: jax.Array, rejected: jax.Array) -> jax.Array:
        both = jnp.stack([chosen, rejected], axis=1)
        return both.reshape(-1, *both.shape[2:])

    return jax.tree.map(join, batch.chosen, batch.rejected)


def separate(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Undoes `interleave` for an array whose rows are interleaved: (chosen, rejected)."""
    pairs = x.reshape(-1, 2, *x.shape[1:])
    return pairs[:, 0], pairs[:, 1]


def pairs_in_row(batch: PairBatch) -> int | None:
    """S, the largest number of pairs in a packed row; None where every row is one pair."""
    return None if batch.mask is None else batch.mask.shape[1]


def pair_mask(batch: PairBatch) -> jax.Array:
    """Which pairs count: `[B]`, or `[B, S]` packed. Rows that only fill up a batch do not."""
    if batch.mask is not None:
        return jnp.asarray(batch.mask)
    return jnp.any(batch.chosen.loss_mask, axis=1) & jnp.any(batch.rejected.loss_mask, axis=1)
