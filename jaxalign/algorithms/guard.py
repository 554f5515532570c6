"""The numeric guard of a train step: a non-finite or spiking update leaves the state unchanged.

    ok = finite(loss) and finite(‖g‖) and finite(θ + u) and ‖g‖ ≤ k · median of the last ‖g‖
    state ← ok ? new state : old state

The guard runs on the devices, in the step's own program: nothing is read back to the host. The
metric `bad_steps` is 1 if the state was left unchanged, and 0 otherwise.

Whether all new weights are finite is known only after the last array, when the first old ones
would already be overwritten. So the update is computed an extra time beforehand, in a branch that
returns one bit and keeps no array. Then the state is chosen without a second copy of it: by
`where`, which the compiler fuses into the loop that updates an array, or in a branch
(`Backend.update_in_branch`).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxalign.models.backend import backend
from jaxalign.types import Array, Params, TrainState

WARM_UP = 10
"""The number of norms that must be known before one can count as a spike."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikeConfig:
    """When the norm of a gradient is a spike.

    Attributes:
      factor: k > 1; an update with a norm above k times the running median is skipped.
      window: number of recent norms in the median. Spikes are included, so that a run whose
        gradients have grown for good continues after half a window.
    """

    factor: float = 10.0
    window: int = 64

    def __post_init__(self):
        if not self.factor > 1:
            raise ValueError(f"skip_spikes factor={self.factor}: wanted a number above 1")
        if self.window < WARM_UP:
            raise ValueError(f"skip_spikes window={self.window}: wanted {WARM_UP} or more")


class SpikeState(NamedTuple):
    """State of an optimizer that `skip_spikes` wraps.

    Attributes:
      inner: the state of the wrapped optimizer.
      norms: float32 `[window]`, the last gradient norms, in any order; NaN where there is none yet.
      count: int32, norms so far.
      limit: float32 scalar, the largest norm that is not a spike.
    """

    inner: Any
    norms: Array
    count: Array
    limit: Array


def skip_spikes(
    tx: optax.GradientTransformation, config: SpikeConfig
) -> optax.GradientTransformation:
    """Wraps an optimizer to keep the last gradient norms in its state, for steps of `make_step`.

    It changes no update itself: the step compares its gradient's norm with `SpikeState.limit`. Make
    it the outermost wrapper, around everything that clips or scales.
    """

    def init(params: Params) -> SpikeState:
        norms = jnp.full(config.window, jnp.nan, jnp.float32)
        return SpikeState(
            tx.init(params), norms, jnp.zeros((), jnp.int32), jnp.array(jnp.inf, jnp.float32)
        )

    def update(updates: Any, state: Any, params: Params | None = None) -> tuple[Any, SpikeState]:
        norm = optax.tree.norm(updates)
        norms = state.norms.at[state.count % config.window].set(norm)
        count = state.count + 1
        median = jnp.nanmedian(norms)
        limit = jnp.where(count >= WARM_UP, config.factor * median, jnp.inf)
        updates, inner = tx.update(updates, state.inner, params)
        return updates, SpikeState(inner, norms, count, limit.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


class Guarded(NamedTuple):
    """The result of `guarded_update`.

    Attributes:
      state: the new train state, or the old one.
      bad: float32 scalar, 1 if `state` is the old one, else 0.
    """

    state: TrainState
    bad: jax.Array


def guarded_update(
    tx: optax.GradientTransformation, state: TrainState, grads: Params, loss: Array, norm: Array
) -> Guarded:
    """One optimizer step, if loss, gradient and new weights are finite and the norm is not a spike.

    Optimizer state in host memory goes to the device one array at a time. In that case the new
    weights are not checked.

    Args:
      tx: the optimizer.
      state: the state to update.
      grads: gradients, a tree like the state's parameters.
      loss: the loss, a scalar.
      norm: global 2-norm of `grads`. One that overflows float32 counts as not finite.
    """
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    on_host = _on_host(state.opt_state)
    if not on_host:
        finite = jax.lax.cond(finite, _stays_finite(tx), _never, grads, state)
    limits = _limits(state.opt_state)
    ok = functools.reduce(jnp.logical_and, [norm <= limit for limit in limits], finite)

    def update(params: Params, opt_state: Any, grads: Params) -> tuple[Params, Any]:
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def keep(params: Params, opt_state: Any, grads: Params) -> tuple[Params, Any]:
        if not limits:
            return params, opt_state
        _, seen = tx.update(grads, opt_state, params)
        return params, _choose(jnp.zeros((), bool), finite, seen, opt_state)

    old = (state.params, state.opt_state)
    if backend().update_in_branch and not on_host:
        params, opt_state = jax.lax.cond(ok, update, keep, *old, grads)
    else:
        params, opt_state = _choose(ok, finite, update(*old, grads), old)
    new = state._replace(
        step=state.step + ok.astype(state.step.dtype), params=params, opt_state=opt_state
    )
    return Guarded(new, 1.0 - ok.astype(jnp.float32))


def _choose(ok: jax.Array, finite: jax.Array, new: Any, old: Any) -> Any:
    """The new arrays if `ok`, else the old ones; but a spike's norm is remembered, if `finite`."""

    def choose(ours: Any, theirs: Any) -> Any:
        if not isinstance(ours, SpikeState):
            return jnp.where(ok, ours, theirs)
        seen = jax.tree.map(functools.partial(jnp.where, finite), ours, theirs)
        return seen._replace(inner=jax.tree.map(choose, ours.inner, theirs.inner))

    return jax.tree.map(choose, new, old, is_leaf=_is_spike_state)


def _is_spike_state(x: Any) -> bool:
    return isinstance(x, SpikeState)


def _limits(opt_state: Any) -> list[jax.Array]:
    """The largest norm that is not a spike, if an optimizer of `skip_spikes` is in use."""
    found = jax.tree.leaves(opt_state, is_leaf=_is_spike_state)
    return [jnp.asarray(x.limit) for x in found if isinstance(x, SpikeState)]


def _stays_finite(tx: optax.GradientTransformation) -> Any:
    def check(grads: Params, state: TrainState) -> jax.Array:
        updates, _ = tx.update(grads, state.opt_state, state.params)
        return all_finite(optax.apply_updates(state.params, updates))

    return check


def _never(grads: Params, state: TrainState) -> jax.Array:
    return jnp.zeros((), bool)


def all_finite(tree: Any) -> jax.Array:
    """Whether every floating number of a tree is finite; a bool scalar."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return (
        jnp.stack([jnp.all(jnp.isfinite(x)) for x in floats]).all() if floats else jnp.array(True)
    )


def _on_host(tree: Any) -> bool:
    host = jax.memory.Space.Host
    return any(jax.typeof(x).memory_space == host for x in jax.tree.leaves(tree))
