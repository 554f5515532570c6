"""Adafactor: the second moment of a matrix as the product of its rows' and columns' means.

    r ← β r + (1 − β) mean_out(g² + ε),   c ← β c + (1 − β) mean_in(g² + ε),   β = 1 − t^−0.8
    u = g / √(r cᵀ / mean(r)),   update = u / max(1, rms(u))

(Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235, algorithms 4 and 5, without momentum and
with the schedule's learning rate instead of one relative to the weights, as in Hugging Face's
trainers.) Parameters with fewer than 128 rows or columns keep a full second moment. A stack of
layers is many matrices: each has its own means and `rms`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from jaxalign.algorithms.matrices import matrix_axes

MIN_FACTORED = 128
"""The shorter side of a factored matrix is at least this long."""

_CLIP = 1.0


def scale_by_adafactor() -> optax.GradientTransformation:
    """Updates before weight decay and learning rate; the state is `optax.FactoredState`."""
    scale: Any = optax.scale_by_factored_rms(min_dim_size_to_factor=MIN_FACTORED)
    clip: Any = optax.clip_by_block_rms(_CLIP)

    def init_leaf(p: jax.Array) -> Any:
        factored = scale.init(p)
        return factored.v_row, factored.v_col, factored.v

    def init(params: Any) -> optax.FactoredState:
        parts = _transposed(params, lambda path, p: _each(path, p, init_leaf)(jnp.asarray(p)))
        return optax.FactoredState(jnp.zeros((), jnp.int32), *parts)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.FactoredState]:
        if params is None:
            raise ValueError("adafactor wants the parameters: update(updates, state, params)")

        def update_leaf(g: Any, v_row: Any, v_col: Any, v: Any, p: Any) -> Any:
            factored = optax.FactoredState(state.count, v_row, v_col, v)
            u, new = scale.update(g, factored, p)
            return clip.update(u, optax.EmptyState())[0], new.v_row, new.v_col, new.v

        u, *parts = _transposed(
            updates,
            lambda path, g, *rest: _each(path, g, update_leaf)(g, *rest),
            state.v_row,
            state.v_col,
            state.v,
            params,
        )
        return u, optax.FactoredState(state.count + 1, *parts)

    return optax.GradientTransformation(init, update)


def factored_spec(
    path: tuple[Any, ...], spec: PartitionSpec, shape: tuple[int, ...]
) -> PartitionSpec | None:
    """How a factored moment is sharded: like the rows or columns that it belongs to.

    Args:
      path: path of a leaf in an optimizer's state.
      spec: the parameter's sharding spec.
      shape: the parameter's shape.

    Returns:
      None for any other leaf, and for the placeholders of parameters that are not factored.
    """
    side = next((n for n in ("v_row", "v_col") if any(_is(key, n) for key in path)), None)
    if side is None or len(shape) < 2 or min(shape[-2:]) < MIN_FACTORED:
        return None
    if matrix_axes(path, len(shape)) < 2:
        return None
    # optax averages `v_row` over the longer side, `v_col` over the shorter one.
    shorter, longer = (len(shape) - 2 + int(i) for i in np.argsort(shape[-2:]))
    gone = longer if side == "v_row" else shorter
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    return PartitionSpec(*(axis for i, axis in enumerate(axes) if i != gone))


def _is(key: Any, name: str) -> bool:
    return getattr(key, "name", None) == name


def _each(path: tuple[Any, ...], leaf: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Turns a function of one matrix or vector into a function of a stack of them."""
    for _ in range(len(leaf.shape) - matrix_axes(path, len(leaf.shape))):
        function = jax.vmap(function)
    return function


def _transposed(tree: Any, function: Callable[..., tuple[Any, ...]], *rest: Any) -> list[Any]:
    """Maps leaves to tuples, and gives a tree for each entry of the tuples."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    results = [
        function(path, leaf, *more) for (path, leaf), *more in zip(with_paths, *others, strict=True)
    ]
    return [structure.unflatten(part) for part in zip(*results, strict=True)]
