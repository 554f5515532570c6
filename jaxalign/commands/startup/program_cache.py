"""Compiled programs on disk: the same command starts faster the next time."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

FOLDER = "JAXALIGN_CACHE"
"""Environment variable: the folder of compiled programs; empty turns the cache off."""

_SHORTEST = 0.2
"""Seconds of compilation from which a program is worth its disk space."""


def cache_programs() -> pathlib.Path | None:
    """Turns on JAX's persistent compilation cache, unless the user has turned it on or off.

    A program for a CPU may use every instruction of that CPU. Machines that share a home folder may
    differ in their processors, so the folder's name contains a hash of the processor.

    Returns:
      The folder; None if nothing was changed.
    """
    chosen = os.environ.get(FOLDER)
    if chosen == "" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = pathlib.Path(chosen or pathlib.Path(home) / "jaxalign" / "programs").expanduser()
    folder = root / hashlib.sha256(_processor().encode()).hexdigest()[:12]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # a read-only home is no reason to stop
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _processor() -> str:
    """The processor's model and instruction sets, as text."""
    facts = [platform.machine(), platform.processor()]
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names = ("model name", "flags", "Features", "CPU part")
        facts += sorted({line for line in lines if line.startswith(names)})
    return "\n".join(facts)
