"""The attention mask as a few integers per token; as a matrix only for short rows.

A token attends to itself and to earlier tokens of its own segment. Within a segment it attends only
to branch 0 and to its own branch; with a sliding window, only to the positions just before it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """The segment, position and branch of each token of a row.

    Attributes:
      ids: int32 `[B, N]`, each token's segment; 0 is padding.
      positions: int32 `[B, N]`, from 0 in each document.
      branches: int32 `[B, N]`, or None for rows without branches.
    """

    ids: Any
    positions: Any
    branches: Any = None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["query", "key", "windowed", "query_start", "matrix"],
    meta_fields=["cached", "window", "zigzag", "exchange"],
)
@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """Which of T queries attend to which of S keys; a pytree.

    Attributes:
      query: segments of the T queries.
      key: segments of the S keys.
      cached: False: keys are columns of the same rows, and a query attends to no later column.
        True: keys are a cache that was written in any order; a query attends to no later position,
        and to no column of segment 0.
      window: how many positions a query attends to, including its own; None: all.
      windowed: bool scalar, whether the window applies; traced if layers differ. None: it does.
      query_start: int32 scalar, the column of the first query among the keys; None: 0. It is set on
        a device that holds a part of every row.
      matrix: bool `[B, 1, T, S]` that replaces all of the above.
      zigzag: the tokens of every row are in zigzag order (`parallel.zigzag`), so a column is not
        the token's place in the row. Kernels support this; `make_mask` does not.
      exchange: how queries reach other devices' keys if the mesh splits rows along their length:
        "gather", "ring" or "ulysses", see `jaxalign.models.attention.exchange`.
    """

    query: Segments | None = None
    key: Segments | None = None
    cached: bool = False
    window: int | None = None
    windowed: Any = None
    query_start: Any = None
    matrix: Any = None
    zigzag: bool = False
    exchange: str = "gather"

    def with_matrix(self) -> MaskSpec:
        """The same spec with its matrix, which short rows make once for all layers."""
        return dataclasses.replace(self, matrix=make_mask(self))

    def at_columns(self, columns: jax.Array) -> MaskSpec:
        """The mask of the queries in `columns` `[B, Q]` only.

        Queries no longer are the keys' columns, so their positions say what is later.
        """
        query = jax.tree.map(lambda x: jnp.take_along_axis(x, columns, axis=1), self.query)
        return dataclasses.replace(self, query=query, cached=True, matrix=None)


def make_mask(
    spec: MaskSpec, start: Any = 0, size: int | None = None, stop: int | None = None
) -> jax.Array:
    """The mask of a block of queries.

    Args:
      spec: the mask.
      start: first query of the block; may be traced.
      size: queries in the block; None: all.
      stop: use only keys before this column; None: all.

    Returns:
      bool `[B, 1, size, stop]`, True where a query attends to a key.
    """
    if spec.matrix is not None:
        if size is None:
            return spec.matrix
        return _block(spec.matrix, start, size, axis=2)[..., :stop]  # [B, 1, size, stop]
    if spec.zigzag:
        raise ValueError("a MaskSpec in zigzag order has no matrix: only kernels take it")
    if spec.query is None or spec.key is None:
        raise ValueError("a MaskSpec wants segments of queries and keys, or a matrix")
    size = spec.query.ids.shape[1] if size is None else size
    stop = spec.key.ids.shape[1] if stop is None else stop
    query = jax.tree.map(  # [B, T] -> [B, size, 1]
        lambda x: _block(jnp.asarray(x), start, size, axis=1)[:, :, None], spec.query
    )
    key = jax.tree.map(lambda x: jnp.asarray(x)[:, None, :stop], spec.key)  # [B, S] -> [B, 1, stop]
    mask = query.ids == key.ids  # [B, size, stop]
    if spec.cached:
        mask &= (key.positions <= query.positions) & (key.ids > 0)
    else:
        first = 0 if spec.query_start is None else spec.query_start
        column = first + start + jnp.arange(size)
        mask &= (column[:, None] >= jnp.arange(stop)[None, :])[None]  # [1, size, stop]
    if query.branches is not None:
        mask &= (key.branches == 0) | (key.branches == query.branches)
    if spec.window is not None:
        window = jnp.asarray(spec.window, jnp.int32)
        if spec.windowed is not None:
            window = jnp.where(spec.windowed, window, jnp.iinfo(jnp.int32).max)
        mask &= query.positions - key.positions < window
    return mask[:, None]  # [B, 1, size, stop]


def _block(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
