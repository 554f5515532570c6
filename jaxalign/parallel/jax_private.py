"""What JAX has no public name for: the only file that uses its private ones.

They may change with any version of JAX. Each is looked up when it is asked for, so that one that is
gone fails what needs it and nothing else. `tests/test_jax_private.py` fails when JAX has a public
name for one: then that takes its place here, or better where it is used.
"""

from __future__ import annotations

from typing import Any


def coordination() -> Any:
    """State of the service that connects the processes: its `client`, `coordinator_address`.

    Orbax and others reach it the same way.
    """
    from jax._src.distributed import global_state

    return global_state


def on_cloud_tpu_vm() -> bool:
    """Whether JAX takes this machine for a VM with TPUs."""
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def has_cuda() -> bool:
    """Whether the CUDA plugin is there and says which versions of CUDA's libraries it has."""
    from jax._src.lib import cuda_versions

    return cuda_versions is not None


def count_compiled(jitted: Any) -> int:
    """For how many kinds of arguments a `jax.jit` function is compiled by now."""
    return jitted._cache_size()
