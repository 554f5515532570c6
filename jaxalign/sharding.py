"""From logical axes to layouts on a mesh, batches on a mesh, and compiled steps.

Which mesh axes a logical axis is split over is said in `axis_rules` alone.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign import host_rows
from jaxalign.axis_rules import Rules, current_rules, keep_rules, use_rules
from jaxalign.jax_private import count_compiled
from jaxalign.meshes import describe, make_mesh
from jaxalign.types import TrainState


def partition_spec(axes: str, rules: Rules | None = None, mesh: Any = None) -> PartitionSpec:
    """Turns logical axes (`"embed mlp"`) into a `PartitionSpec`.

    Args:
      axes: names from `rules`, one a dimension. `heads/64` is an axis of heads of 64 entries each,
        which are not to be torn apart.
      rules: logical axis → mesh axis (or axes); None: the table that holds now.
      mesh: concrete or abstract; mesh axes that it lacks are left out. None: all are kept.

    Raises:
      ValueError: an unknown logical axis, or two axes that map to the same mesh axis.
    """
    entries: list[Any] = []
    used: set[str] = set()
    for axis in axes.split():
        names = mesh_axes(axis, mesh, rules, axes)
        clash = used.intersection(names)
        if clash:
            raise ValueError(f"logical axes {axes!r} map to mesh axis {clash.pop()!r} twice")
        used.update(names)
        entries.append(names if len(names) > 1 else names[0] if names else None)
    return PartitionSpec(*entries)


def mesh_axes(axis: str, mesh: Any, rules: Rules | None = None, axes: str = "") -> tuple[str, ...]:
    """The mesh axes that a logical axis is split over.

    Args:
      axis: its name.
      mesh: axes that it lacks are left out; None: none.
      rules: logical axis → mesh axes; None: the table that holds now.
      axes: what the name stood in, for the message.

    Raises:
      ValueError: there is no such logical axis.
    """
    name = axis.partition("/")[0]
    rules = current_rules() if rules is None else rules
    if name not in rules:
        raise ValueError(
            f"unknown logical axis {name!r} in {axes or axis!r}; known: {', '.join(rules)}"
        )
    target = rules[name]
    names = (target,) if isinstance(target, str) else tuple(target or ())
    return tuple(name for name in names if mesh is None or name in mesh.axis_names)


def param_shardings(axes: Any, mesh: Mesh, shapes: Any = None, rules: Rules | None = None) -> Any:
    """Shardings of a parameter tree.

    Args:
      axes: nested dict of logical-axes strings, e.g. `{"kernel": "layers embed mlp"}`.
      mesh: where the parameters go.
      shapes: nested dict of arrays or `ShapeDtypeStruct` with the same structure; when given,
        every sharded dimension is checked to divide.
      rules: logical axis → mesh axis; None: the table that holds now.

    Raises:
      ValueError: a dimension that the mesh axis does not divide: which, by what, what would fit.
    """
    if shapes is not None:
        jax.tree_util.tree_map_with_path(
            lambda path, a, s: _check_divides(jax.tree_util.keystr(path), a, s.shape, mesh, rules),
            axes,
            shapes,
        )
    return jax.tree.map(lambda a: NamedSharding(mesh, partition_spec(a, rules, mesh)), axes)


def reshard(params: Any, axes: Any, mesh: Mesh) -> Any:
    """Lays parameters out on another mesh (of the same devices, say) by one `device_put`.

    Args:
      params: nested dict of arrays, wherever they lie.
      axes: nested dict of their logical axes, `model.axes`.
      mesh: where they are to lie.
    """
    return jax.device_put(params, param_shardings(axes, mesh, params))


def relaid(params: Any, axes: Any, over: Rules | None) -> Any:
    """Parameters on their mesh as other entries of the table say; as they lie for None.

    Args:
      params: nested dict of arrays.
      axes: nested dict of their logical axes, `model.axes`.
      over: logical axis → mesh axes, see `use_rules`.
    """
    mesh = mesh_of(params)
    if not over or mesh is None:
        return params
    with use_rules(over):
        return reshard(params, axes, mesh)


def _check_divides(
    name: str, axes: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules | None
) -> None:
    partition_spec(axes, rules, mesh)
    for axis, size in zip(axes.split(), shape, strict=True):
        kind, _, each = axis.partition("/")
        names = mesh_axes(axis, mesh, rules)
        parts = math.prod(mesh.shape[n] for n in names)
        count = size // int(each or 1)
        if count % parts:
            fits = [d for d in range(1, count + 1) if count % d == 0 and d <= 4096]
            whole = f"size {count}" if not each else f"{count} parts of {each}"
            raise ValueError(
                f"parameter {name} {shape}: axis {kind!r} has {whole}, which mesh axis "
                f"{'×'.join(names)}={parts} does not divide; sizes that would fit: {fits}"
            )


def constrain(x: jax.Array, axes: str) -> jax.Array:
    """Pins an activation to its logical axes; without a mesh in context, returns it unchanged."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, mesh=mesh))


def constrain_last(x: jax.Array, axes: str) -> jax.Array:
    """Like `constrain`; what two logical axes are split over, the later one gets.

    `axes` may name more than x has: those at the end, which then only take theirs from the others.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    taken: set[str] = set()
    parts: list[tuple[str, ...]] = []
    for axis in reversed(axes.split()):
        parts.append(tuple(name for name in mesh_axes(axis, mesh) if name not in taken))
        taken.update(parts[-1])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*parts[::-1][: x.ndim]))


def axis_shards(axis: str, mesh: Mesh | None = None) -> int:
    """Over how many shards a logical axis is split on this mesh (by default the current one)."""
    here = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return math.prod(here.shape[name] for name in mesh_axes(axis, here))


def row_shards(mesh: Mesh | None = None) -> int:
    """Over how many shards a batch's rows are split on this mesh (by default the current one)."""
    return axis_shards("rows", mesh)


def row_axes(mesh: Mesh | None = None) -> str:
    """The mesh axes that rows are split over, in words: "data × fsdp"."""
    here = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return " × ".join(mesh_axes("rows", here))


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """How every leaf of a batch lies on the mesh: rows split, the rest whole."""
    return NamedSharding(mesh, partition_spec("rows", mesh=mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that a tree of arrays lies on, or None where none of them lies on one."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Makes `mesh` the current one; does nothing for None."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def part_of_rows(mesh: Mesh) -> tuple[int, int]:
    """Which part of every batch this process reads: `(index, count)`, for `host=` of the data.

    With one process (0, 1): all rows.
    """
    return _part_of_rows(rows_sharding(mesh), row_shards(mesh))


_part_of_rows = functools.lru_cache(maxsize=16)(host_rows.host_part)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Places a batch of host arrays on the mesh, rows split over all axes that split rows.

    With several processes, each gives its own rows (see `part_of_rows`), and gets global arrays of
    all rows. Global arrays are laid out anew where they lie otherwise.

    Raises:
      ValueError: the number of rows is not a multiple of the row shards.
    """
    sharding = rows_sharding(mesh)
    parts = row_shards(mesh)
    part = part_of_rows(mesh)

    def place(path: Any, x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        rows = np.shape(x)[0] * (part[1] if host_rows.is_local(x) else 1)
        if rows % parts:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {rows} rows, which the mesh "
                f"({row_axes(mesh)} = {parts}) does not divide; use a multiple of {parts} rows"
            )
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return host_rows.place_rows(x, sharding, part)

    return jax.tree_util.tree_map_with_path(place, batch)


def local_rows(batch: Any, mesh: Mesh | None = None) -> Any:
    """This process's rows of a batch as numpy arrays; with one process all of them.

    Args:
      batch: arrays whose first axis is rows; `shard_batch` puts such rows together again.
      mesh: where they lie; by default found out.
    """
    mesh = mesh_of(batch) if mesh is None else mesh
    if mesh is None or jax.process_count() == 1:
        return jax.device_get(batch)
    sharding, part = rows_sharding(mesh), part_of_rows(mesh)
    return jax.tree.map(lambda x: host_rows.host_rows(x, sharding, part), batch)


def carried(batch: Any, mesh: Mesh) -> Any:
    """A batch on another mesh, as `shard_batch` lays it out.

    Between meshes of other devices rows go by way of the hosts: they are few bytes, and no process
    needs the rows of another.

    Raises:
      ValueError: a process has other rows here than there.
    """
    home = mesh_of(batch)
    if home is None or set(home.devices.flat) == set(mesh.devices.flat):
        return shard_batch(batch, mesh)
    if part_of_rows(home) != part_of_rows(mesh):
        raise ValueError(
            f"rows on mesh {describe(home.shape)} are to go to mesh {describe(mesh.shape)}, but "
            "hosts have other rows there; give every host the same share of both meshes"
        )
    return shard_batch(local_rows(batch, home), mesh)


def all_rows(batch: Any) -> Any:
    """All rows of a batch as numpy arrays on every process; all of them must call this."""
    if jax.process_count() == 1:
        return jax.device_get(batch)
    return jax.tree.map(host_rows.whole, batch)


class CompiledStep:
    """A train step compiled for one mesh: what `compile_step` returns. Call it like the step."""

    def __init__(self, step: Callable[..., Any], state: TrainState, mesh: Mesh):
        self.mesh = mesh
        self._rules = keep_rules()
        self._shardings = jax.tree.map(lambda x: _on_mesh(x, mesh), state)
        trained, frozen = _part(self._shardings)

        # Only what the step replaces is donated: frozen parameters are shared with their owner.
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
        """Runs one step; `state` is donated (all but `frozen`) and must not be used again."""
        trained, frozen = _part(jax.tree.map(_place, state, self._shardings))
        with jax.set_mesh(self.mesh), self._rules():
            trained, metrics = self._jitted(trained, frozen, shard_batch(batch, self.mesh))
        return trained._replace(frozen=frozen), metrics

    def lower(self, state: Any, batch: Any) -> Any:
        """Lowers for abstract or concrete arguments, without running."""
        with jax.set_mesh(self.mesh), self._rules():
            return self._jitted.lower(*_part(state), batch)

    @property
    def compiles(self) -> int:
        """How many times the step was compiled. More than 1 in steady state is a bug."""
        return count_compiled(self._jitted)


def _part(state: TrainState) -> tuple[TrainState, Any]:
    return state._replace(frozen={}), state.frozen


def _on_mesh(x: Any, mesh: Mesh) -> NamedSharding:
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return replicated(mesh)
    if sharding.mesh != mesh:
        raise ValueError(
            f"compile_step on mesh {describe(mesh.shape)}: the state lies on another mesh, "
            f"{describe(sharding.mesh.shape)}; make both with one mesh"
        )
    return sharding


def _place(x: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if not host_rows.is_local(x):
        return host_rows.lay_out(x, sharding)
    return jax.device_put(x, sharding)


def compile_step(
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]],
    state: TrainState,
    mesh: Mesh | None = None,
) -> CompiledStep:
    """Compiles a pure train step: jit, donated state, pinned shardings.

    The state keeps the layout it has in `state` (see `load_pretrained(mesh=…)` and `init_state`);
    leaves that are not on the mesh are replicated. Batches may be host arrays: their rows are
    split over `data × fsdp × expert`. Metrics come back replicated.

    Args:
      step: `(state, batch) -> (state, metrics)`, as the algorithms' `make_step` returns.
      state: concrete arrays or `ShapeDtypeStruct`s that carry shardings.
      mesh: by default the one the state lies on, or else all devices along `fsdp`.

    Raises:
      ValueError: the state lies on another mesh.
    """
    mesh = mesh_of(state) if mesh is None else mesh
    return CompiledStep(step, state, make_mesh() if mesh is None else mesh)
