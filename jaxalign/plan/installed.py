"""Checks the installed accelerator software: whether it fits JAX, and whether JAX uses it."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
from packaging.requirements import Requirement
from packaging.version import Version

COMPILERS = {
    "libtpu": "tpu",
    "jax-cuda12-plugin": "cuda12",
    "jax-cuda13-plugin": "cuda13",
}
"""Package that compiles for accelerators → the extra of JAX that pins its version."""

_LIBRARIES = {"jax-cuda12-plugin": "with-cuda", "jax-cuda13-plugin": "with-cuda"}
_SIGNS = {"tpu": ("/dev/accel0", "/dev/vfio/0"), "cuda12": ("/dev/nvidia0", "/dev/nvidiactl")}
"""Extra → device files that only machines with such an accelerator have."""


class Problem(NamedTuple):
    """Something that does not fit together.

    Attributes:
      what: the problem, with names and versions.
      remedy: what to do about it.
    """

    what: str
    remedy: str


def installed(package: str) -> str | None:
    """The version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def unmet(package: str, of: str, extra: str = "") -> Requirement | None:
    """The requirement of `of` that an installed package violates; None: it fits.

    Args:
      package: the required package.
      of: the package that requires it. If either is missing, the result is None.
      extra: the extra of `of` with the requirement; "": only its unconditional requirements.
    """
    got = installed(package)
    if got is None:  # or under another name, as a nightly build is
        return None
    for wanted in _required(of):
        if wanted.name != package or bool(extra) != ("extra" in str(wanted.marker or "")):
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        # Without the part after "+", which describes the build.
        if not wanted.specifier.contains(Version(got).public, prereleases=True):
            wanted.marker = None
            return wanted
    return None


def conflicts() -> list[Problem]:
    """Compilers and CUDA libraries of versions that JAX does not support."""
    found = []
    present = [package for package in COMPILERS if installed(package)]
    for package in present:
        wanted = unmet(package, "jax", COMPILERS[package])
        if wanted is not None:
            found.append(_wrong(package, "JAX", jax.__version__, wanted))
        extra = _LIBRARIES.get(package, "")
        for name in _names(package, extra):
            wanted = unmet(name, package, extra)
            if wanted is not None:
                found.append(_wrong(name, package, str(installed(package)), wanted))
    cuda = [package for package in present if package in _LIBRARIES]
    if len(cuda) > 1:
        found.append(
            Problem(
                f"{' and '.join(cuda)} are both installed",
                f"keep one: pip uninstall {cuda[0]} {cuda[0].replace('plugin', 'pjrt')}",
            )
        )
    return found


def overlooked(devices: Sequence[jax.Device]) -> list[Problem]:
    """Accelerators that the machine seems to have but that JAX does not use.

    Args:
      devices: the result of `jax.devices()`.
    """
    if any(device.platform != "cpu" for device in devices):
        return []
    for extra, files in _SIGNS.items():
        if not any(pathlib.Path(file).exists() for file in files):
            continue
        plugins = [name for name, of in COMPILERS.items() if of[:4] == extra[:4]]
        if platforms := os.environ.get("JAX_PLATFORMS"):
            return [Problem(f"JAX_PLATFORMS={platforms} keeps JAX off the accelerator", "unset it")]
        if not any(installed(name) for name in plugins):
            kind = f"jaxalign[{extra}]"
            return [
                Problem("there is an accelerator, and no plugin for it", f'pip install "{kind}"')
            ]
        there = ", ".join(name for name in plugins if installed(name))
        return [
            Problem(
                f"there is an accelerator and {there}, but JAX computes on the processor",
                "see why: JAX_LOGGING_LEVEL=DEBUG jaxalign doctor; a driver that is too old and "
                "another process that holds the device are the usual reasons",
            )
        ]
    return []


def _names(of: str, extra: str) -> list[str]:
    """The packages that an extra of `of` requires."""
    return [r.name for r in _required(of) if extra and extra in str(r.marker or "")]


def _required(of: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in importlib.metadata.requires(of) or ()]
    except importlib.metadata.PackageNotFoundError:
        return []


def _wrong(package: str, by: str, version: str, wanted: Requirement) -> Problem:
    return Problem(
        f"{package} {installed(package)} is installed, {by} {version} wants "
        f"{package} {wanted.specifier}",
        f'pip install "{wanted}"',
    )
