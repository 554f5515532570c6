"""Huge memory pages for computing on a CPU under Linux.

XLA allocates the temporary memory of every step again. glibc then maps and unmaps it in pages of 4
KiB: tens of thousands of page faults per step, a tenth of a small model's time. From version 2.35
on, glibc can ask the kernel for pages of 2 MiB (`glibc.malloc.hugetlb`), but it reads that setting
only when a process starts.
"""

from __future__ import annotations

import os
import pathlib
import sys

from jaxalign.parallel.platforms import computes_on_cpu

_VARIABLE = "GLIBC_TUNABLES"
_SETTING = "glibc.malloc.hugetlb"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def environment() -> dict[str, str]:
    """Environment variables for a process that computes on a CPU.

    Returns:
      Nothing if the user has set this tunable, or if it would change nothing: the C library is not
      glibc or too old, or the kernel gives huge pages to every process or to none.
    """
    tunables = os.environ.get(_VARIABLE, "")
    if _SETTING in tunables or _glibc() < (2, 35) or not _on_request():
        return {}
    return {_VARIABLE: f"{tunables}:{_SETTING}=1".lstrip(":")}


def restart_with_huge_pages() -> None:
    """Re-executes this process with huge pages, if it will compute on a CPU.

    The process keeps its id and its arguments. This happens only once, since the new process finds
    the variable set. Call it before importing JAX, because everything loaded so far is loaded
    again.
    """
    added = environment() if computes_on_cpu() else {}
    if added:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)


def _glibc() -> tuple[int, ...]:
    try:
        library, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    except (AttributeError, OSError, ValueError):
        return (0,)
    return tuple(int(x) for x in version.split(".")) if library == "glibc" else (0,)


def _on_request() -> bool:
    """Whether the kernel gives huge pages only to processes that request them."""
    try:
        return "[madvise]" in _KERNEL.read_text(encoding="ascii")
    except OSError:
        return False
