"""The facts that `doctor` reports: versions, machine, devices, and suitable meshes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from packaging.requirements import Requirement

from jaxalign.parallel.chips import GIB, chip_of
from jaxalign.plan.installed import COMPILERS, installed

_VARIABLES = re.compile(r"(JAX|XLA|LIBTPU|TPU|NCCL|JAXALIGN|CUDA_VISIBLE|HF_(HOME|HUB|DATASETS))")
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSWORD")

# Bytes per parameter in float32: weights, gradients and two moments if trained, weights if frozen.
# docs/memory.md has the calculation.
_BYTES = {
    "SFT or a reward model": 16,
    "DPO": 20,
    "PPO with its four models": 40,
    "GRPO or RLOO": 24,
}
_LEFT = 0.5  # fraction of a device's memory for activations


class Machine(NamedTuple):
    """The host.

    Attributes:
      system: operating system and kind of processor.
      cores: the number of cores this process may use.
      memory: the host's memory, bytes; None if it cannot be read.
      free_disk: bytes, in the current folder.
      free_cache: bytes, where models from the hub are stored.
    """

    system: str
    cores: int
    memory: int | None
    free_disk: int
    free_cache: int


def versions() -> dict[str, str]:
    """Versions of Python, of this package, and of what it needs or can use."""
    try:
        needed = importlib.metadata.requires("jaxalign") or ()
    except importlib.metadata.PackageNotFoundError:
        needed = ()
    required = [r.name for r in map(Requirement, needed) if "extra" not in str(r.marker or "")]
    names = dict.fromkeys(["jaxalign", "jax", "jaxlib", *required, *COMPILERS, "torch"])
    found = {name: version for name in names if (version := installed(name))}
    return {"python": platform.python_version()} | found


def machine() -> Machine:
    """The host as this process sees it."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        cores = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Machine(
        f"{platform.system()} {platform.release()}, {platform.machine()}",
        cores,
        memory,
        shutil.disk_usage(".").free,
        shutil.disk_usage(_existing(os.path.expanduser(home))).free,
    )


def variables() -> dict[str, str]:
    """Environment variables that affect JAX or this package; secrets are not included."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if _VARIABLES.match(name) and not _SECRET.search(name)
    }


def device_memory(device: jax.Device) -> int | None:
    """Bytes that programs may use on a device; None if unknown, as on a CPU."""
    chip = chip_of(device.device_kind)
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or (None if chip is None else chip.memory)


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Number, kind, memory and hosts of the devices."""
    size = device_memory(devices[0])
    memory = "" if size is None else f" of {size / GIB:.1f} GiB"
    hosts = len({device.process_index for device in devices})
    where = f" on {hosts} hosts" if hosts > 1 else ""
    return f"{len(devices)} × {devices[0].device_kind}{memory}{where}"


def meshes(count: int, hosts: int = 1) -> list[tuple[str, str]]:
    """(mesh as overrides, when to use it), for a number of devices.

    Args:
      count: devices.
      hosts: over which they are spread evenly.
    """
    if count == 1:
        return [("mesh.fsdp=1", "one device: nothing is split")]
    within = count // hosts
    found = [(f"mesh.fsdp={count}", "the default: parameters and rows over all devices")]
    if hosts > 1:
        found.append(
            (
                f"mesh.data={hosts} mesh.fsdp={within}",
                "whole parameters on each host: only gradients cross the slow network",
            )
        )
    if within % 2 == 0:
        tensor = 4 if within % 4 == 0 and within > 4 else 2
        found.append(
            (
                f"mesh.fsdp={count // tensor} mesh.tensor={tensor}",
                "fewer rows than devices, or PPO's rollouts on many devices",
            )
        )
        found.append(
            (
                f"mesh.fsdp={count // 2} mesh.sequence=2",
                "rows too long for one device",
            )
        )
    return found


def largest_models(memory: int, count: int) -> list[tuple[str, float]]:
    """(kind of run, billions of parameters whose weights and moments fit in half of the memory).

    Args:
      memory: bytes of a device.
      count: devices, over which `fsdp` divides everything.
    """
    return [(run, _LEFT * memory * count / size / 1e9) for run, size in _BYTES.items()]


def as_dict(devices: Sequence[jax.Device], variables: Mapping[str, str]) -> dict[str, Any]:
    """All facts, for `--json`."""
    return {
        "versions": versions(),
        "machine": machine()._asdict(),
        "devices": [
            {
                "kind": device.device_kind,
                "platform": device.platform,
                "process": device.process_index,
                "memory": device_memory(device),
            }
            for device in devices
        ],
        "variables": dict(variables),
    }


def _existing(path: str) -> str:
    """The nearest folder of a path that exists."""
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path
