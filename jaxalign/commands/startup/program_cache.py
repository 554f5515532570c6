"""Compiled programs kept on disk, so that the same command starts faster the next time."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform

import jax

FOLDER = "JAXALIGN_CACHE"
"""Environment variable: the folder to keep programs in; empty for none."""

_SHORTEST = 0.2
"""Seconds of compilation from which a program is worth keeping."""


def keep_programs() -> pathlib.Path | None:
    """Turns JAX's persistent cache on, unless it is on, or off, already.

    Programs for a CPU may use all its instructions, so that machines that share a home folder and
    differ in their processors must not share them: the processor is part of the folder's name.

    Returns:
      The folder; None where nothing was changed.
    """
    asked = os.environ.get(FOLDER)
    if asked == "" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = pathlib.Path(asked or pathlib.Path(home) / "jaxalign" / "programs").expanduser()
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
    """What the processor is and can do."""
    known = [platform.machine(), platform.processor()]
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names = ("model name", "flags", "Features", "CPU part")
        known += sorted({line for line in lines if line.startswith(names)})
    return "\n".join(known)
