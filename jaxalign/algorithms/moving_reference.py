"""A moving reference (TR-DPO): an optax wrapper with the reference in the optimizer's state.

Gorbatovski et al. 2024 (https://arxiv.org/abs/2404.09656): every `every` updates

    θ_ref ← α θ + (1 − α) θ_ref

α < 1 is their soft update (with `every: 1` a moving average), α = 1 their hard update. The
reference is part of the optimizer's state, so it is sharded like the parameters, saved, and resumed
exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.types import Array, Params, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceSync:
    """How often and how far the reference moves towards the policy.

    Attributes:
      every: updates between two moves of the reference.
      alpha: α in (0, 1], how far the reference moves: 1 copies the policy.
    """

    every: int = 512
    alpha: float = 0.6

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"reference_sync every={self.every}: wanted a positive integer")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"reference_sync alpha={self.alpha}: wanted 0 < alpha ≤ 1")


class MovingReferenceState(NamedTuple):
    """The wrapped optimizer's state, and the reference.

    Attributes:
      count: updates so far, int32.
      reference: the reference's parameters, like the trained ones.
      inner: the state of the optimizer itself.
    """

    count: Array
    reference: Params
    inner: Any


def with_moving_reference(
    tx: optax.GradientTransformation, sync: ReferenceSync
) -> optax.GradientTransformation:
    """Wraps an optimizer to keep a reference in its state, which starts as the parameters."""

    def init(params: Params) -> MovingReferenceState:
        return MovingReferenceState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.array, params), tx.init(params)
        )

    def update(
        updates: Any, state: Any, params: Params | None = None, **_: Any
    ) -> tuple[Any, MovingReferenceState]:
        if params is None:
            raise ValueError(
                "with_moving_reference(tx) wants the parameters: update(updates, state, params)"
            )
        updates, inner = tx.update(updates, state.inner, params)
        count = state.count + 1
        moves = count % sync.every == 0

        def move(reference: jax.Array, param: jax.Array) -> jax.Array:
            moved = reference + sync.alpha * (param - reference) if sync.alpha < 1 else param
            return jnp.where(moves, moved.astype(reference.dtype), reference)

        reference = jax.tree.map(move, state.reference, optax.apply_updates(params, updates))
        return updates, MovingReferenceState(count, reference, inner)

    return optax.GradientTransformation(init, update)


def reference_of(state: TrainState) -> Params:
    """The reference in the state of an optimizer made by `with_moving_reference`."""
    if not isinstance(state.opt_state, MovingReferenceState):
        raise ValueError(
            "the train state holds no reference; make its optimizer with `with_moving_reference`"
        )
    return state.opt_state.reference


def start_reference(state: TrainState, ref_params: Params) -> TrainState:
    """The state with another model's parameters, copied, as the initial reference.

    Raises:
      ValueError: they differ in structure or shape from the trained parameters.
    """
    shapes, ref_shapes = (jax.tree.map(jnp.shape, x) for x in (reference_of(state), ref_params))
    if shapes != ref_shapes:
        raise ValueError(
            "the reference differs in shape from the policy, so it cannot move towards it; use "
            "the model that the policy started from, or no reference_sync"
        )
    copy = jax.tree.map(
        lambda new, old: jax.device_put(jnp.array(new, old.dtype, copy=True), old.sharding),
        ref_params,
        reference_of(state),
    )
    return state._replace(opt_state=state.opt_state._replace(reference=copy))
