"""JAX's private names: the only file that uses them.

They may change with any version of JAX. Each is imported when it is used, so that a missing one
breaks only its caller. `tests/parallel/test_jax_private.py` fails once JAX has a public name for
one; use that name at the call site then.
"""

from __future__ import annotations

from typing import Any


def coordination() -> Any:
    """State of the coordination service: its `client` and `coordinator_address`.

    Orbax and others access it the same way.
    """
    from jax._src.distributed import global_state

    return global_state


def on_cloud_tpu_vm() -> bool:
    """Whether JAX detects a Cloud TPU VM."""
    from jax._src import cloud_tpu_init

    return cloud_tpu_init.running_in_cloud_tpu_vm


def has_cuda() -> bool:
    """Whether the CUDA plugin is installed and reports the versions of CUDA's libraries."""
    from jax._src.lib import cuda_versions

    return cuda_versions is not None


def count_compiled(jitted: Any) -> int:
    """Number of compiled variants of a `jax.jit` function."""
    return jitted._cache_size()
