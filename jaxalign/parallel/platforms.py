"""Selects or predicts the platform that JAX will use, before JAX starts.

The module does not import JAX, because the `jaxalign` command calls these functions first.
"""

from __future__ import annotations

import importlib.util
import os


def computes_on_cpu() -> bool:
    """Whether JAX will find no accelerator, without starting it.

    `JAX_PLATFORMS` decides if it is set. Otherwise this looks for JAX's plugins: libtpu for TPUs,
    `jax_plugins` for GPUs.
    """
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return platforms == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("libtpu", "jax_plugins"))


def leave_accelerators_alone() -> None:
    """Keeps this process and its children off accelerators, for commands that run no step.

    JAX reserves an accelerator as soon as it sees it, and a training run may need this one.
    """
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"  # for processes started from here
    jax.config.update("jax_platforms", "cpu")


def split_cpu(topology: str | None) -> None:
    """Shows JAX the devices of a topology such as `cpu:8`; does nothing for any other.

    The user's settings in `XLA_FLAGS` take precedence. Call it before the first use of a device.
    """
    platform, _, count = (topology or "").partition(":")
    if platform == "cpu" and count.isdecimal() and "XLA_FLAGS" not in os.environ:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
