"""Train states: their initial values, and the shardings of the optimizer's state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxalign.algorithms.adafactor import factored_spec
from jaxalign.algorithms.low_precision_adam import row_scale_spec
from jaxalign.parallel.host_memory import HOST, is_offloaded
from jaxalign.parallel.sharding import mesh_of, replicated
from jaxalign.types import Params, TrainState


def init_state(
    params: Params, tx: optax.GradientTransformation, frozen: Params | None = None
) -> TrainState:
    """Makes a train state; copies the parameters, because steps donate their state.

    Args:
      params: the trained parameters. If they are on a mesh, the optimizer's state is sharded like
        them.
      tx: any optax transformation.
      frozen: untrained parameters that the forward pass needs (shared, not copied).
    """
    params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)
    mesh = mesh_of(params)
    if mesh is None:
        opt_state = jax.jit(tx.init)(params)
        step = jnp.zeros((), jnp.int32)
    else:
        opt_state = jax.jit(tx.init, out_shardings=opt_state_shardings(params, tx))(params)
        step = jax.device_put(jnp.zeros((), jnp.int32), replicated(mesh))
    return TrainState(step, params, {} if frozen is None else frozen, opt_state)


def opt_state_shardings(params: Params, tx: optax.GradientTransformation) -> Any:
    """Shardings of `tx`'s state: moments like their parameters, the rest replicated.

    Some optimizers shard leaves in their own way: `row_scale_spec`, `factored_spec`,
    `is_offloaded`.

    Args:
      params: arrays, or `ShapeDtypeStruct`s with shardings, on one mesh.
      tx: the optax transformation.

    Raises:
      ValueError: the parameters are on no mesh.
    """
    mesh = mesh_of(params)
    if mesh is None:
        raise ValueError("the parameters lie on no mesh; load them with mesh=…")
    by_path = dict(jax.tree_util.tree_leaves_with_path(params))

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # A moment has its parameter's path within the optimizer's state. (optax's own
        # tree_map_params cannot see through `optax.partition`.)
        for start in range(len(path)):
            param = by_path.get(path[start:])
            if param is None:
                continue
            if param.shape == leaf.shape:
                return param.sharding
            layout = param.sharding.spec
            for spec in (
                row_scale_spec(path, layout, len(param.shape)),
                factored_spec(path, layout, param.shape),
            ):
                if spec is not None:
                    return NamedSharding(mesh, spec)
        return replicated(mesh)

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        layout = sharding(path, leaf)
        return layout.with_memory_kind(HOST) if is_offloaded(path, leaf) else layout

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))
