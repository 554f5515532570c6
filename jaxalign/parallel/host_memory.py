"""Offloads optimizer state and frozen weights to pinned host memory.

Only the update reads optimizer state, and only `prepare` reads frozen weights, so neither needs
device memory during forward and backward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import optax

from jaxalign.types import Params

T = TypeVar("T")

HOST = "pinned_host"
"""JAX's name of the memory kind."""


class HostState(NamedTuple):
    """State of an optimizer wrapped by `offload_state`.

    Attributes:
      host: state of the inner optimizer; on a mesh its arrays are in pinned host memory.
    """

    host: optax.OptState


def offload_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer so that its state stays in pinned host memory between updates.

    Each update copies the state to the device and back; the compiler may overlap copies with the
    update and free each array early. `opt_state_shardings` recognises the state by its type
    `HostState`. Without a mesh nothing is offloaded. TPUs, GPUs and CPUs have pinned host memory.
    """

    def init(params: Params) -> HostState:
        return HostState(tx.init(params))

    def update(
        updates: Params, state: Any, params: Params | None = None
    ) -> tuple[Params, HostState]:
        local = jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), state.host)
        updates, new_state = tx.update(updates, local, params)
        return updates, HostState(new_state)

    return optax.GradientTransformation(init, update)


def to_host_memory(tree: T) -> T:
    """Copies arrays to pinned host memory; each host keeps the shards of its devices.

    Args:
      tree: pytree of arrays. Jitted functions that read the result must call `on_device` on it.
    """
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding.with_memory_kind(HOST)), tree)


def on_device(tree: T) -> T:
    """Inside a jitted function: copies arrays in host memory to the device for this execution."""
    host, device = jax.memory.Space.Host, jax.memory.Space.Device

    def fetch(x: jax.Array) -> jax.Array:
        return jax.device_put(x, device) if jax.typeof(x).memory_space == host else x

    return jax.tree.map(fetch, tree)


@contextlib.contextmanager
def computing_on_host() -> Iterator[None]:
    """Context in which new arrays are in host memory and computations run there.

    It does nothing if `JAX_PLATFORMS` excludes the CPU.
    """
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        yield
        return
    with jax.default_device(device):
        yield


def is_cpu(device: jax.Device) -> bool:
    """Whether a device's memory is host memory, so that numpy reads its arrays without a copy."""
    return device.platform == "cpu"


def is_offloaded(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a leaf of an optimizer's state is offloaded: all but scalars in a `HostState` are."""
    return bool(leaf.shape) and any(getattr(key, "name", None) == "host" for key in path)
