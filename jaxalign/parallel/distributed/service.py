"""JAX's coordination service: its key-value store, and each process's host name and pid."""

from __future__ import annotations

import functools
import os
import socket
from typing import Any

import jax

from jaxalign.parallel.jax_private import coordination

PREFIX = "jaxalign"


def client() -> Any:
    """JAX's client of the coordination service; None in a job of one process."""
    return coordination().client


def seconds(name: str, default: int) -> int:
    """Reads a number of seconds from an environment variable.

    Raises:
      ValueError: not a positive whole number.
    """
    text = os.environ.get(name, str(default)).strip()
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{name}={text!r}: wanted a positive whole number of seconds")
    return int(text)


def reachable(timeout: float = 2.0) -> bool:
    """Whether the service's port on process 0's machine accepts a connection."""
    host, _, port = str(coordination().coordinator_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError:
        return False
    return True


def announce() -> None:
    """Publishes this process's host name and pid to the other processes."""
    name = f"{socket.gethostname()}, pid {os.getpid()}"
    client().key_value_set(f"{PREFIX}/who/{jax.process_index()}", name, allow_overwrite=True)


@functools.lru_cache(maxsize=4096)
def who(index: int) -> str:
    """The name of a process in messages: `process 3 (host-3, pid 71)`."""
    try:
        return f"process {index} ({client().blocking_key_value_get(f'{PREFIX}/who/{index}', 2000)})"
    except Exception:  # the service may be gone, and the message that says so must still be built
        return f"process {index}"
