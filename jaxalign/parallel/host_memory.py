"""In the host's memory: what is not read all the time need not lie on the device.

Optimizer state is read by the update alone, frozen models by what is asked of them between updates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

HOST = "pinned_host"
"""The kind of memory, as JAX names it."""


class HostState(NamedTuple):
    """State of a wrapped optimizer.

    Attributes:
      host: the state of the optimizer itself; on a mesh its arrays lie in the host's memory.
    """

    host: Any


def in_host_memory(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimizer with its state in the host's memory between updates.

    The state comes to the device for the update, an array at a time where the compiler so arranges
    it, and goes back after. `opt_state_shardings` knows it by its type; without a mesh it stays
    where it is. TPUs, GPUs and CPUs have that memory.
    """

    def init(params: Any) -> HostState:
        return HostState(tx.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, HostState]:
        here = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), state.host)
        updates, new = tx.update(updates, here, params)
        return updates, HostState(new)

    return optax.GradientTransformation(init, update)


def to_host_memory(tree: Any) -> Any:
    """Copies of arrays in the host's memory, each device's part with its host.

    Args:
      tree: of arrays. Programs that read it must fetch it, by `on_device`.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), tree)


def on_device(tree: Any) -> Any:
    """Inside a program: fetches what lies in the host's memory, for as long as the program runs."""
    host, device = jax.memory.Space.Host, jax.memory.Space.Device

    def fetch(x: Any) -> Any:
        return jax.device_put(x, device) if jax.typeof(x).memory_space == host else x

    return jax.tree.map(fetch, tree)


def lies_in_host_memory(path: Any, leaf: Any) -> bool:
    """Whether an array of an optimizer's state belongs there: all but counters."""
    return bool(leaf.shape) and any(getattr(key, "name", None) == "host" for key in path)
