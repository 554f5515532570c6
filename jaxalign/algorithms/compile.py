"""A train step compiled for one mesh: jit, donated state, pinned shardings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxalign.parallel import host_rows
from jaxalign.parallel.jax_private import count_compiled
from jaxalign.parallel.mesh import describe, make_mesh
from jaxalign.parallel.rules import capture_rules
from jaxalign.parallel.sharding import mesh_of, replicated, rows_sharding, shard_batch
from jaxalign.types import TrainState


class CompiledStep:
    """A train step compiled for one mesh: what `compile_step` returns. Call it like the step."""

    def __init__(self, step: Callable[..., Any], state: TrainState, mesh: Mesh):
        self.mesh = mesh
        self._rules = capture_rules()
        self._shardings = jax.tree.map(lambda x: _sharding_on(x, mesh), state)
        trained, frozen = _part(self._shardings)

        # Donate only what the step replaces: the caller still uses the frozen parameters.
        def run(trained: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Any]:
            state, metrics = step(trained._replace(frozen=frozen), batch)
            return state._replace(frozen={}), metrics

        self._jitted = jax.jit(
            run,
            donate_argnums=0,
            in_shardings=(trained, frozen, rows_sharding(mesh)),
            out_shardings=(trained, replicated(mesh)),
        )

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
        """Runs one step. `state`, except `frozen`, is donated and must not be used again."""
        trained, frozen = _part(jax.tree.map(_place, state, self._shardings))
        with jax.set_mesh(self.mesh), self._rules():
            trained, metrics = self._jitted(trained, frozen, shard_batch(batch, self.mesh))
        return trained._replace(frozen=frozen), metrics

    @property
    def placement(self) -> str:
        """Describes in a sentence which devices hold the state, and how much of it is sharded."""
        shardings = jax.tree.leaves(self._shardings)
        split = sum(not x.is_fully_replicated for x in shardings)
        devices = self.mesh.devices.ravel()
        kinds = ", ".join(sorted({device.device_kind for device in devices}))
        return (
            f"{devices.size} × {kinds} as a mesh of {describe(self.mesh.shape)}: {split} of the "
            f"state's {len(shardings)} arrays are split over them, the others lie whole on each"
        )

    def __repr__(self) -> str:
        return f"CompiledStep({self.placement})"

    def lower(self, state: Any, batch: Any) -> Any:
        """Lowers the step for abstract or concrete arguments, without running it."""
        with jax.set_mesh(self.mesh), self._rules():
            return self._jitted.lower(*_part(state), batch)

    @property
    def compiles(self) -> int:
        """How often the step has been compiled. A count that grows in steady state is a bug."""
        return count_compiled(self._jitted)


def _part(state: TrainState) -> tuple[TrainState, Any]:
    return state._replace(frozen={}), state.frozen


def _sharding_on(x: Any, mesh: Mesh) -> NamedSharding:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return replicated(mesh)
    if sharding.mesh != mesh:
        raise ValueError(
            f"compile_step on mesh {describe(mesh.shape)}: the state is on another mesh, "
            f"{describe(sharding.mesh.shape)}; make both with one mesh"
        )
    return sharding


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if not host_rows.is_local(x):
        return host_rows.reshard_array(x, sharding)
    return jax.device_put(x, sharding)


def compile_step(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    mesh: Mesh | None = None,
) -> CompiledStep:
    """Compiles a pure train step: jit, donated state, pinned shardings.

    The state keeps the layout it has in `state` (see `load_pretrained(mesh=…)` and `init_state`);
    leaves that are not on the mesh are replicated. Batches may be host arrays: their rows are split
    over `data × fsdp × expert`. Metrics come back replicated. `step.placement` says which devices
    hold the state. If the state is on no mesh and several devices are chosen for it, the placement
    is printed.

    Args:
      step: `(state, batch) -> (state, metrics)`, as the algorithms' `make_step` returns.
      state: concrete arrays or `ShapeDtypeStruct`s that carry shardings.
      mesh: None: the state's mesh, or if it has none, all devices along `fsdp`.

    Raises:
      ValueError: the state is on another mesh.
    """
    mesh = mesh_of(state) if mesh is None else mesh
    compiled = CompiledStep(step, state, make_mesh() if mesh is None else mesh)
    if mesh is None and compiled.mesh.size > 1:
        print(f"compile_step: the state is on no mesh; it is placed on {compiled.placement}")
    return compiled
