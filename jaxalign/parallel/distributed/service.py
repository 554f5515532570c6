"""The service that connects the processes of a job: its key-value store, and who is who."""

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
    """A number of seconds from the environment.

    Raises:
      ValueError: not a positive whole number.
    """
    text = os.environ.get(name, str(default)).strip()
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(f"{name}={text!r}: wanted a positive whole number of seconds")
    return int(text)


def reachable(timeout: float = 2.0) -> bool:
    """Whether somebody listens where the service is, on the machine of process 0."""
    host, _, port = str(coordination().coordinator_address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout).close()
    except OSError:
        return False
    return True


def announce() -> None:
    """Tells the others which machine this process runs on."""
    here = f"{socket.gethostname()}, pid {os.getpid()}"
    client().key_value_set(f"{PREFIX}/who/{jax.process_index()}", here, allow_overwrite=True)


@functools.lru_cache(maxsize=4096)
def who(index: int) -> str:
    """A process by number and machine, as messages name it."""
    try:
        return f"process {index} ({client().blocking_key_value_get(f'{PREFIX}/who/{index}', 2000)})"
    except Exception:  # the service may be gone: a message about that must still be made
        return f"process {index}"
