"""Splits a rollout into the mini-batches of its updates, one answer per row or packed."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.ppo.packing import (
    pack_rows,
    plan_rows,
    tokens_and_start,
    without_answers,
)
from jaxalign.algorithms.ppo.rows import answer_mask_of
from jaxalign.parallel.sharding import mesh_of, row_shards, shard_batch
from jaxalign.types import Array, RolloutBatch


def minibatches(
    key: jax.Array | None,
    rollout: RolloutBatch,
    epochs: int = 4,
    count: int = 4,
    *,
    pack: int = 0,
    multiple: int = 1,
    samples: int = 1,
    permutations: Array | None = None,
) -> Iterator[RolloutBatch]:
    """Splits a rollout into `epochs × count` mini-batches of whole rows.

    Every epoch uses every row once, in a new order from `fold_in(key, epoch)`.

    Args:
      key: PRNG key; None with `permutations`.
      rollout: B rows.
      epochs: passes over the rollout.
      count: mini-batches per epoch; B must be a multiple of it.
      pack: 0 keeps one answer per row. n > 0 packs the answers of a mini-batch end to end into
        fewer, longer rows (`packing`), with the smallest of n shapes that holds them: a step
        compiles at most n shapes. Losses and gradients are the same. `scores`, `finished` and
        `valid` are then None, because they belong to answers and not to rows.
      samples: with `pack`: so many adjacent rows answer one prompt, and packed rows hold it once
        for those of them that are in one mini-batch. 1: every answer has its own copy.
      multiple: the number of packed rows is a multiple of this (and of the mesh's row shards), for
        steps with as many `micro_batches`.
      permutations: int `[epochs, B]`, the order of rows in each epoch, instead of the orders from
        `key`, to replay those of another implementation.

    Raises:
      ValueError: B is not a multiple of `count`, or a number is out of range.
    """
    rows = rollout.advantages.shape[0]
    if min(epochs, count, multiple, samples) < 1 or pack < 0:
        raise ValueError(
            f"epochs={epochs}, count={count}, pack={pack}, multiple={multiple}, samples={samples}: "
            "wanted positive integers (pack also 0)"
        )
    if rows % count:
        raise ValueError(f"{rows} rollout rows do not divide into count={count} mini-batches")
    mesh = mesh_of(rollout)
    multiple *= row_shards(mesh) if mesh is not None else 1
    tokens, start = None, 0
    if pack:
        rollout = without_answers(rollout)
        tokens, start = tokens_and_start(rollout.tokens, jnp.asarray(answer_mask_of(rollout)))
    for order in _orders(key, epochs, rows, permutations):
        for part_rows in np.split(order, count):
            plan = None
            if tokens is not None:
                plan = plan_rows(
                    tokens, part_rows.tolist(), sizes=pack, multiple=multiple, samples=samples,
                    start=start,
                )  # fmt: skip
            if plan is None:
                part = _take_rows(rollout, part_rows)
            else:
                part = pack_rows(rollout, plan)
            yield part if mesh is None else shard_batch(part, mesh)


def _orders(
    key: jax.Array | None, epochs: int, rows: int, permutations: Array | None
) -> list[np.ndarray]:
    """The order of rows in each epoch."""
    if permutations is not None:
        orders = np.asarray(permutations)
        if orders.shape != (epochs, rows) or (np.sort(orders, axis=1) != np.arange(rows)).any():
            raise ValueError(
                f"permutations {orders.shape}: wanted [epochs, B] = ({epochs}, {rows}), numbers "
                "from 0 to B − 1 in each"
            )
        return list(orders)
    if key is None:
        raise ValueError("key=None without permutations; wanted one of them")
    # Compute all orders at once, before the first step runs: reading one waits for the device.
    keys = [jax.random.fold_in(key, epoch) for epoch in range(epochs)]
    return jax.device_get([jax.random.permutation(epoch, rows) for epoch in keys])


@jax.jit
def _take_rows(rollout: RolloutBatch, rows: Array) -> RolloutBatch:
    return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), rollout)
