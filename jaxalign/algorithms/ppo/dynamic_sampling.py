"""DAPO's dynamic sampling: groups of other prompts replace zero-variance groups."""

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
    """Replaces zero-variance groups of `rollout` with groups of `other` that have a signal.

    A group is the `samples` answers to one prompt. If they all have the same score, group-relative
    advantages are 0 (Yu et al. 2025, arXiv 2503.14476, eq. 11). Groups move whole, in order, each
    at most once, so that advantages, which compare the answers of a group, stay valid. Every
    process must call this.

    Args:
      rollout: B answers `[B, T]`.
      other: answers to other prompts, `[C, S]`, with the same fields.
      samples: answers per prompt.

    Returns:
      A rollout of B answers and max(T, S) columns, and how many of its groups still have zero
      variance.
    """
    empty, _ = _groups(rollout, samples)
    _, useful = _groups(other, samples)
    places, donors = np.flatnonzero(empty), np.flatnonzero(useful)
    count = min(len(places), len(donors))
    if not count:
        return rollout, len(places)
    rows = np.arange(len(empty) * samples).reshape(-1, samples)
    other_rows = np.arange(len(useful) * samples).reshape(-1, samples) + rows.size
    rows[places[:count]] = other_rows[donors[:count]]
    return _take(rollout, other, rows.reshape(-1)), len(places) - count


def count_equal_groups(rollout: RolloutBatch, samples: int) -> int:
    """How many groups have zero variance; every process must call this."""
    return int(_groups(rollout, samples)[0].sum())


def _groups(rollout: RolloutBatch, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """(zero variance, some variance), bool `[B / samples]` each; False for padding in both."""
    scores, valid = all_gather_rows((rollout.scores, rollout.valid))
    alike = np.asarray(equal_groups(scores, valid, samples)).reshape(-1, samples)[:, 0]
    real = np.asarray(valid, bool).reshape(-1, samples).any(1)
    return alike & real, ~alike & real


@jax.jit
def _take(rollout: RolloutBatch, other: RolloutBatch, rows: Array) -> RolloutBatch:
    def both(a: Any, b: Any) -> jax.Array:
        if a.ndim > 1 and a.shape[1] != b.shape[1]:  # of another bucket: pad columns
            most, rest = max(a.shape[1], b.shape[1]), ((0, 0),) * (a.ndim - 2)
            a, b = (jnp.pad(x, ((0, 0), (0, most - x.shape[1]), *rest)) for x in (a, b))
        return jnp.take(jnp.concatenate([a, b]), rows, axis=0)

    return jax.tree.map(both, rollout, other)
