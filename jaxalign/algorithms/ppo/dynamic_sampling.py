"""DAPO's dynamic sampling: other prompts in the places of those whose answers all score alike."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.losses.advantages import equal_groups
from jaxalign.parallel.sharding import all_gather_rows
from jaxalign.types import Array, RolloutBatch


def fill_equal_groups(
    rollout: RolloutBatch, other: RolloutBatch, samples: int
) -> tuple[RolloutBatch, int]:
    """Puts groups of `other` in the places of groups of `rollout` that have nothing to learn from.

    A group, the `samples` answers to one prompt, has nothing to learn from where all its answers
    score alike: group-relative advantages are 0 (Yu et al. 2025, arXiv 2503.14476, eq. 11). Groups
    are taken in order, each at most once, and whole: advantages, which compare the answers of a
    group, stay what they were. Every process must call this.

    Args:
      rollout: B answers `[B, T]`.
      other: further answers to other prompts, `[C, S]`, with the same fields.
      samples: answers a prompt.

    Returns:
      A rollout of B answers and max(T, S) columns, and how many of its groups still have nothing to
      learn from.
    """
    empty, _ = _groups(rollout, samples)
    _, useful = _groups(other, samples)
    places, donors = np.flatnonzero(empty), np.flatnonzero(useful)
    count = min(len(places), len(donors))
    if not count:
        return rollout, len(places)
    rows = np.arange(len(empty) * samples).reshape(-1, samples)
    theirs = np.arange(len(useful) * samples).reshape(-1, samples) + rows.size
    rows[places[:count]] = theirs[donors[:count]]
    return _take(rollout, other, rows.reshape(-1)), len(places) - count


def count_equal_groups(rollout: RolloutBatch, samples: int) -> int:
    """How many groups have nothing to learn from; every process must call this."""
    return int(_groups(rollout, samples)[0].sum())


def _groups(rollout: RolloutBatch, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """bool `[B / samples]`, of the groups that are no padding: scored alike, and not."""
    scores, valid = all_gather_rows((rollout.scores, rollout.valid))
    alike = np.asarray(equal_groups(scores, valid, samples)).reshape(-1, samples)[:, 0]
    there = np.asarray(valid, bool).reshape(-1, samples).any(1)
    return alike & there, ~alike & there


@jax.jit
def _take(rollout: RolloutBatch, other: RolloutBatch, rows: Array) -> RolloutBatch:
    def both(a: Any, b: Any) -> jax.Array:
        if a.ndim > 1 and a.shape[1] != b.shape[1]:  # of another bucket: columns that hold nothing
            a, b = (
                jnp.pad(x, ((0, 0), (0, max(a.shape[1], b.shape[1]) - x.shape[1]))) for x in (a, b)
            )
        return jnp.take(jnp.concatenate([a, b]), rows, axis=0)

    return jax.tree.map(both, rollout, other)
