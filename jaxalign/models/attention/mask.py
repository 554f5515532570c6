"""Which token may look at which, as a few integers a token; as a matrix only where rows are short.

A token sees tokens of its own segment that are not after it; within its segment, those of branch 0
and of its own branch only; within a window, those whose position is near.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Marks(NamedTuple):
    """What decides what a token sees.

    Attributes:
      segments: int32 `[B, N]`.
      positions: int32 `[B, N]`, from 0 in each document.
      branches: int32 `[B, N]`, or None for rows without branches.
    """

    segments: Any
    positions: Any
    branches: Any = None


class Lookout(NamedTuple):
    """The arrays of a `Sight` along a row, for functions that take arrays only.

    Attributes:
      looking: marks of the T tokens that look.
      seen: marks of the S tokens that are looked at.
      window: int32 scalar, how many tokens one sees, itself included; None: all.
      first: int32 scalar, the column in `seen` of the first token that looks; None: 0.
      matrix: bool `[B, 1, T, S]` with everything above already in it, or None.
    """

    looking: Marks
    seen: Marks
    window: Any = None
    first: Any = None
    matrix: Any = None


@dataclasses.dataclass(frozen=True)
class Sight:
    """Which of T tokens sees which of S.

    Attributes:
      looking: marks of the tokens that look.
      seen: marks of those looked at.
      cached: False: both are the same columns (T = S), and what comes later in the row is hidden.
        True: `seen` is a cache written in any order; later positions are hidden, and segment 0.
      window: how many tokens one sees, itself included, by positions; None: all.
      windowed: whether the window holds, a traced bool where layers differ; None: it does.
      matrix: bool `[B, 1, T, S]`, if `with_matrix` made it.
    """

    looking: Marks
    seen: Marks
    cached: bool = False
    window: int | None = None
    windowed: Any = None
    matrix: Any = None

    def lookout(self) -> Lookout:
        """Its arrays."""
        window = self.window
        if window is not None:
            wide = jnp.iinfo(jnp.int32).max
            window = jnp.asarray(window, jnp.int32)
            window = window if self.windowed is None else jnp.where(self.windowed, window, wide)
        return Lookout(self.looking, self.seen, window, None, self.matrix)

    def with_matrix(self) -> Sight:
        """The same with the matrix made, for short rows: once for all layers."""
        whole = visible(self.lookout(), cached=self.cached)
        return dataclasses.replace(self, matrix=whole)


def visible(
    lookout: Lookout, start: Any = 0, size: int | None = None, stop: int | None = None, *,
    cached: bool = False,
) -> jax.Array:  # fmt: skip
    """Which token sees which, for `size` tokens from `start` on and columns before `stop`.

    Returns:
      bool `[B, 1, size, stop]`.
    """
    if lookout.matrix is not None:
        whole = lookout.matrix
        return whole if size is None else _part(whole, start, size, 2)[..., :stop]
    length, columns = (x.segments.shape[1] for x in lookout[:2])
    size, stop = length if size is None else size, columns if stop is None else stop
    looking = jax.tree.map(lambda x: _part(jnp.asarray(x), start, size, 1)[:, :, None], lookout[0])
    seen = jax.tree.map(lambda x: jnp.asarray(x)[:, None, :stop], lookout[1])
    sees = looking.segments == seen.segments
    if cached:
        sees &= (seen.positions <= looking.positions) & (seen.segments > 0)
    else:
        first = 0 if lookout.first is None else lookout.first
        own = first + start + jnp.arange(size)
        sees &= (own[:, None] >= jnp.arange(stop)[None, :])[None]
    if looking.branches is not None:
        sees &= (seen.branches == 0) | (seen.branches == looking.branches)
    if lookout.window is not None:
        sees &= looking.positions - seen.positions < lookout.window
    return sees[:, None]


def _part(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    if isinstance(start, int):
        return jax.lax.slice_in_dim(x, start, start + size, axis=axis)
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)
