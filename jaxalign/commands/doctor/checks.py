"""What `doctor` checks: packages, accelerators, memory and disk, each with what to do."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence

import jax
from packaging.requirements import Requirement

from jaxalign.commands.doctor.facts import Machine
from jaxalign.parallel.chips import GIB
from jaxalign.plan.installed import Problem, conflicts, overlooked, unmet

_SMALL_MEMORY, _SMALL_DISK = 4 * GIB, 5 * GIB


def check_packages() -> list[Problem]:
    """Packages that are missing or of a version that this package or JAX does not support."""
    found = []
    for of in ("jaxalign", "jax"):
        for wanted in _required(of):
            if _missing(wanted.name):
                what = (
                    f"{wanted.name} is not installed, {of} wants {wanted.name} {wanted.specifier}"
                )
                found.append(Problem(what, f'pip install "{wanted}"'))
            elif unmet(wanted.name, of) is not None:
                got = importlib.metadata.version(wanted.name)
                what = (
                    f"{wanted.name} {got} is installed, {of} wants {wanted.name} {wanted.specifier}"
                )
                found.append(Problem(what, f'pip install "{wanted}"'))
    return found + conflicts()


def check_devices(devices: Sequence[jax.Device]) -> list[Problem]:
    """Accelerators that are not used, and devices of different kinds."""
    kinds = sorted({device.device_kind for device in devices})
    mixed = []
    if len(kinds) > 1:
        mixed = [
            Problem(
                f"devices of several kinds: {', '.join(kinds)}",
                "a mesh wants one kind; CUDA_VISIBLE_DEVICES chooses",
            )
        ]
    return mixed + overlooked(devices)


def check_machine(host: Machine) -> list[Problem]:
    """Too little memory or disk for more than a first try."""
    found = []
    if host.memory is not None and host.memory < _SMALL_MEMORY:
        found.append(
            Problem(
                f"the host has {host.memory / GIB:.1f} GiB of memory",
                "the quickstart takes about 3.3 GiB; close other programs, or use a larger machine",
            )
        )
    for free, where, remedy in (
        (host.free_disk, "in this folder", "a run keeps checkpoints here: run.folder, run.keep"),
        (host.free_cache, "where models are stored", "HF_HOME names another folder"),
    ):
        if free < _SMALL_DISK:
            found.append(Problem(f"{free / GIB:.1f} GiB of disk are free {where}", remedy))
    return found


def check_variables() -> list[Problem]:
    """Environment variables that are known to cause surprises."""
    found = []
    if os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true"):
        found.append(Problem("JAX_ENABLE_X64 is set", "unset it: steps compute in float32"))
    if os.environ.get("JAX_DISABLE_JIT", "").lower() in ("1", "true"):
        found.append(Problem("JAX_DISABLE_JIT is set", "unset it: nothing would be compiled"))
    return found


def _required(of: str) -> list[Requirement]:
    """A package's unconditional requirements on this machine."""
    try:
        texts = importlib.metadata.requires(of) or ()
    except importlib.metadata.PackageNotFoundError:
        return []
    found = [Requirement(text) for text in texts]
    found = [r for r in found if "extra" not in str(r.marker or "")]
    return [r for r in found if r.marker is None or r.marker.evaluate()]


def _missing(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False
