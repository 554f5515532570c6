"""Collectives between hosts: barriers, gathered texts, errors raised on all, sums of integers."""

from __future__ import annotations

import collections
import contextlib
import functools
import secrets
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxalign.parallel.distributed.service import PREFIX, client, seconds, who

WAIT = "JAXALIGN_BARRIER_SECONDS"
"""Timeout of a barrier; 1800 seconds by default, because files may be large."""

_used: collections.Counter[str] = collections.Counter()


def is_main() -> bool:
    """Whether this is process 0, which writes logs and single files."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float | None = None) -> None:
    """Blocks until every process has reached this call; with one process, does nothing.

    Args:
      name: what the processes wait for; part of the error message.
      timeout: seconds; None: `JAXALIGN_BARRIER_SECONDS`, or 1800.

    Raises:
      TimeoutError: some processes did not arrive; the message names them.
    """
    if jax.process_count() > 1:
        _gather_at_barrier(name, "", timeout)


def all_gather_text(name: str, text: str, timeout: float | None = None) -> list[str]:
    """Gathers one text from each process, ordered by process index, on every process.

    Args:
      name: subject of the exchange; part of the error message.
      text: this process's contribution.
      timeout: as for `barrier`.

    Raises:
      TimeoutError: as for `barrier`.
    """
    if jax.process_count() == 1:
        return [text]
    return _gather_at_barrier(name, text, timeout)


def _gather_at_barrier(name: str, text: str, timeout: float | None) -> list[str]:
    wait = seconds(WAIT, 1800) if timeout is None else timeout
    # Every process passes the same barriers in the same order, so all compute the same count.
    _used[name] += 1
    topic = f"{PREFIX}/meet/{name.replace('/', ' ')}"
    key = f"{topic}/{_used[name]}"
    service, index, count = client(), jax.process_index(), jax.process_count()
    service.key_value_set(f"{key}/{index}", text)
    try:
        service.wait_at_barrier(key, int(wait * 1000))
    except jax.errors.JaxRuntimeError as error:
        arrived = {int(name.rsplit("/", 1)[1]) for name, _ in service.key_value_dir_get(key)}
        missing = [who(i) for i in range(count) if i not in arrived]
        if not missing and "DEADLINE_EXCEEDED" not in str(error):
            raise
        # A process may arrive between our timeout and the lookup: then none is missing.
        late = ", ".join(missing) or "another process"
        raise TimeoutError(
            f"{name}: {late} did not come within {wait:g} s; the reason is in the log there. "
            f"{WAIT} sets how long to wait"
        ) from error
    texts = {int(name.rsplit("/", 1)[1]): value for name, value in service.key_value_dir_get(key)}
    if is_main() and _used[name] > 1:
        # Every process has passed this barrier, so all have read the previous round.
        service.key_value_delete(f"{topic}/{_used[name] - 1}")
    return [texts[i] for i in range(count)]


def raise_on_all(error: BaseException | None, doing: str) -> None:
    """Barrier that raises on every process if any process passes an error.

    Args:
      error: this process's error, raised again here; None if it succeeded.
      doing: the operation, for the message on the other processes.

    Raises:
      RuntimeError: another process failed.
    """
    message = "" if error is None else f"{type(error).__name__}: {error}"
    messages = all_gather_text(doing, message)
    if error is not None:
        raise error
    for index, message in enumerate(messages):
        if message:
            raise RuntimeError(f"{doing} failed on {who(index)}: {message}")


@contextlib.contextmanager
def fail_together(doing: str) -> Iterator[None]:
    """Runs the body on every process and waits for all; if one fails, all raise.

    Args:
      doing: the operation, for the message on the processes that succeeded.

    Raises:
      RuntimeError: another process failed.
    """
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    raise_on_all(failure, doing)


def broadcast_random() -> int:
    """A random 32-bit number, drawn by process 0 and returned on every process."""
    return int(all_gather_text("a common number", str(secrets.randbits(32)))[0])


def all_reduce_sum(numbers: Sequence[int]) -> Callable[[], list[int]]:
    """Sums integers (each below 2³¹) elementwise over the processes.

    One all-gather on the devices, cheap enough for every step. It is asynchronous: the returned
    function waits for the sums, so that the next step can be dispatched first.
    """
    if jax.process_count() == 1:
        return lambda: list(numbers)
    mesh, gather = _all_gather()
    # [1, N] on each host -> [processes, N] on the mesh
    local = np.asarray(numbers, np.int32)[None]
    gathered = gather(multihost_utils.host_local_array_to_global_array(local, mesh, P("process")))
    # Summed on the host in int64: without jax_enable_x64 the devices would overflow int32.
    return lambda: [int(n) for n in np.asarray(gathered).sum(axis=0, dtype=np.int64)]


@functools.cache
def _all_gather() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """A mesh with a process axis and a jitted all-gather over it; cached to compile once."""
    devices = np.array(sorted(jax.devices(), key=lambda device: (device.process_index, device.id)))
    mesh = Mesh(devices.reshape(jax.process_count(), -1), ("process", "device"))
    return mesh, jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
