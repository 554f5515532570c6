"""Averages of the weights over the updates, to be evaluated or exported in place of the weights.

The exponential moving average (Polyak averaging with a horizon), part of the optimizer's state:

    θ̄ ← d θ̄ + (1 − d) θ                after every update; θ̄ starts as θ

It is float32, sharded like the parameters, saved, and resumed exactly. Schedule-free optimizers
have their own average: they take gradients at y, step z, and are evaluated at

    x = (y − (1 − β₁) z) / β₁

(Defazio et al. 2024, https://arxiv.org/abs/2405.15682, eq. 3).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Params, TrainState


class AveragedState(NamedTuple):
    """The wrapped optimizer's state, and the average.

    Attributes:
      average: θ̄, float32, like the parameters.
      inner: the state of the optimizer itself.
    """

    average: Params
    inner: Any


def with_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Wraps an optimizer to keep a moving average of the weights in its state.

    Args:
      tx: the complete optimizer, with clipping and learning rate.
      decay: d in (0, 1); the average spans about the last 1 / (1 − d) updates.
    """

    def init(params: Params) -> AveragedState:
        average = jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), params)
        return AveragedState(average, tx.init(params))

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, AveragedState]:
        if params is None:
            raise ValueError(
                "with_average(tx) wants the parameters: update(updates, state, params)"
            )
        updates, inner = tx.update(updates, state.inner, params)

        def move(average: jax.Array, param: jax.Array) -> jax.Array:
            return average + (1 - decay) * (param.astype(jnp.float32) - average)

        average = jax.tree.map(move, state.average, optax.apply_updates(params, updates))
        return updates, AveragedState(average, inner)

    return optax.GradientTransformation(init, update)


def averaged_params(state: TrainState) -> Params:
    """The parameters to evaluate and export: averages where the optimizer has them.

    Args:
      state: a train state with concrete arrays.

    Returns:
      The parameters, in their own dtypes and layouts; those without an average are unchanged.
    """
    params = dict(jax.tree_util.tree_leaves_with_path(state.params))
    for found in jax.tree.leaves(state.opt_state, is_leaf=_has_average):
        if _has_average(found):
            params |= _averages(found, params)
    return jax.tree_util.tree_map_with_path(lambda path, _: params[path], state.params)


def schedule_free_average(y: jax.Array, z: jax.Array, b1: Any) -> jax.Array:
    """x = (y − (1 − β₁) z) / β₁, the point that a schedule-free optimizer is evaluated at."""
    return (y.astype(z.dtype) - (1 - b1) * z) / b1


def _has_average(x: Any) -> bool:
    return isinstance(x, (AveragedState, optax.contrib.ScheduleFreeState))


def _averages(found: Any, params: dict[Any, jax.Array]) -> dict[Any, jax.Array]:
    """Path → average, sharded like the parameter; parameters of other optimizers are masked out."""
    tree = found.average if isinstance(found, AveragedState) else found.z
    result = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        param = params[path]
        # An offloaded state lies in host memory.
        value = jax.device_put(leaf, param.sharding)
        if not isinstance(found, AveragedState):
            value = schedule_free_average(param, value, jax.device_get(found.b1))
        result[path] = value.astype(param.dtype)
    return result
