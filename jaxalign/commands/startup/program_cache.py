"""Compiled programs on disk or in a bucket: the same command starts faster the next time."""

from __future__ import annotations

import hashlib
import os
import pathlib
import platform
import uuid

import jax

from jaxalign.data.remote import explained, is_address, place_of, scheme_of

FOLDER = "JAXALIGN_CACHE"
"""Environment variable: the folder of compiled programs, here or in a bucket; empty turns the cache
off."""

_SHORTEST = 0.2
"""Seconds of compilation from which a program is worth its disk space."""

_BUCKETS = ("gs", "s3", "az")
"""Schemes that JAX's cache reads and writes itself, by `etils.epath` and fsspec."""


def cache_programs() -> pathlib.Path | str | None:
    """Turns on JAX's persistent compilation cache, unless the user has turned it on or off.

    A program for a CPU may use every instruction of that CPU. Machines that share a home folder may
    differ in their processors, so the folder's name contains a hash of the processor. Hosts of one
    kind share a folder, also in a bucket: process 0 of a run writes, and all read.

    Returns:
      The folder, or its address; None if nothing was changed.

    Raises:
      ValueError: an address that JAX's cache does not read, or whose package is missing.
    """
    chosen = os.environ.get(FOLDER)
    if chosen == "" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return None
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    kind = hashlib.sha256(_processor().encode()).hexdigest()[:12]
    folder: pathlib.Path | str
    if chosen is not None and scheme_of(chosen) is not None:
        folder = f"{_check_bucket(chosen)}/{kind}"
    else:
        root = pathlib.Path(chosen or pathlib.Path(home) / "jaxalign" / "programs").expanduser()
        folder = root / kind
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None  # do not fail on a read-only home folder
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SHORTEST)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def _check_bucket(address: str) -> str:
    """An address under which JAX can store programs; prints a note if it can only read them."""
    if not is_address(address) or scheme_of(address) not in _BUCKETS:
        known = ", ".join(f"{scheme}://" for scheme in _BUCKETS)
        raise ValueError(f"{FOLDER}={address!r}: wanted a folder, or an address of {known}")
    place = place_of(address, FOLDER)
    probe = place.of(f".{uuid.uuid4().hex}.probe")
    try:
        with explained(address, FOLDER):
            place.fs.pipe_file(probe, b"?")
            place.fs.rm_file(probe)
    except ValueError as error:
        print(f"{error}. Programs are read from there, and new ones are not kept", flush=True)
    return place.address


def _processor() -> str:
    """The processor's model and instruction sets, as text."""
    facts = [platform.machine(), platform.processor()]
    path = pathlib.Path("/proc/cpuinfo")
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names = ("model name", "flags", "Features", "CPU part")
        facts += sorted({line for line in lines if line.startswith(names)})
    return "\n".join(facts)
