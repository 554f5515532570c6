"""Memory in large pages for computing on a CPU under Linux.

XLA asks for the temporary memory of every step anew, and glibc gives and takes it page by page:
tens of thousands of page faults a step, a tenth of a small model's time. glibc can ask the kernel
for pages of 2 MiB instead (`glibc.malloc.hugetlb`, from 2.35 on), but only a process that starts
with that setting does so.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys

_VARIABLE = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """What to add to the environment of a process that computes on a CPU.

    Returns:
      Nothing where it is said already, or would change nothing: the C library is not glibc or too
      old, or the kernel gives large pages to all that ask for none, or to nobody.
    """
    said = os.environ.get(_VARIABLE, "")
    if _SETTING in said or _glibc() < (2, 35) or not _on_request():
        return {}
    return {_VARIABLE: f"{said}:{_SETTING}=1".lstrip(":")}


def restart_command() -> None:
    """Starts the `jaxalign` command over with large pages, if it will compute on a CPU.

    Does nothing in any other program. Called as soon as the package is imported, since what was
    loaded until then is loaded twice. The process keeps its number and its arguments.
    """
    more = environment() if _is_command() and _computes_on_cpu() else {}
    if more:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)


def _is_command() -> bool:
    """Whether this process is `jaxalign …` or `python -m jaxalign.commands.cli …`."""
    program = pathlib.Path(sys.argv[0]).name if sys.argv else ""
    return program in ("jaxalign", "-m") and any(
        x == "jaxalign.commands.cli" or pathlib.Path(x).name == "jaxalign"
        for x in sys.orig_argv[1:3]
    )


def _computes_on_cpu() -> bool:
    """Whether JAX will find nothing else; told without starting it."""
    asked = os.environ.get("JAX_PLATFORMS")
    if asked:
        return asked == "cpu"
    return all(importlib.util.find_spec(name) is None for name in ("libtpu", "jax_plugins"))


def _glibc() -> tuple[int, ...]:
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):
        return (0,)
    return tuple(int(x) for x in version.split(".")) if library == "glibc" else (0,)


def _on_request() -> bool:
    """Whether the kernel gives large pages to those who ask, and only to them."""
    try:
        return "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except OSError:
        return False
