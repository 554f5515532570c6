"""What processes tell one another outside of arrays: barriers, errors, small texts and numbers."""

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
"""How long a process waits for the others, by default 1800 seconds (files may be large)."""

_used: collections.Counter[str] = collections.Counter()


def is_main() -> bool:
    """Whether this process writes logs and single files."""
    return jax.process_index() == 0


def barrier(name: str, timeout: float | None = None) -> None:
    """Waits until every process is here; alone, does nothing.

    Args:
      name: what they come together for, for the message.
      timeout: seconds; None: `JAXALIGN_BARRIER_SECONDS`, or 1800.

    Raises:
      TimeoutError: some did not come; names them.
    """
    if jax.process_count() > 1:
        _meet(name, "", timeout)


def exchange(name: str, text: str, timeout: float | None = None) -> list[str]:
    """Every process's text, in the order of the processes, on every process.

    Args:
      name: what it is about, for the message.
      text: of this process.
      timeout: as for `barrier`.

    Raises:
      TimeoutError: as for `barrier`.
    """
    if jax.process_count() == 1:
        return [text]
    return _meet(name, text, timeout)


def _meet(name: str, text: str, timeout: float | None) -> list[str]:
    wait = seconds(WAIT, 1800) if timeout is None else timeout
    # All processes pass the same barriers in the same order, so they agree on the number.
    _used[name] += 1
    topic = f"{PREFIX}/meet/{name.replace('/', ' ')}"
    place = f"{topic}/{_used[name]}"
    service, index, count = client(), jax.process_index(), jax.process_count()
    service.key_value_set(f"{place}/{index}", text)
    try:
        service.wait_at_barrier(place, int(wait * 1000))
    except jax.errors.JaxRuntimeError as error:
        there = {int(key.rsplit("/", 1)[1]) for key, _ in service.key_value_dir_get(place)}
        missing = [who(i) for i in range(count) if i not in there]
        if not missing and "DEADLINE_EXCEEDED" not in str(error):
            raise
        late = ", ".join(missing) or "another process"  # it came while this one gave up
        raise TimeoutError(
            f"{name}: {late} did not come within {wait:g} s; the reason is in the log there. "
            f"{WAIT} sets how long to wait"
        ) from error
    texts = {int(key.rsplit("/", 1)[1]): value for key, value in service.key_value_dir_get(place)}
    if is_main() and _used[name] > 1:  # whoever is here has read what was said the last time
        service.key_value_delete(f"{topic}/{_used[name] - 1}")
    return [texts[i] for i in range(count)]


def agree(error: BaseException | None, doing: str) -> None:
    """Waits until every process is here, and fails on all of them where one has failed.

    Args:
      error: what went wrong here, if anything; raised again on this process.
      doing: what was being done, for the others' message.

    Raises:
      RuntimeError: another process failed.
    """
    told = exchange(doing, "" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for index, message in enumerate(told):
        if message:
            raise RuntimeError(f"{doing} failed on {who(index)}: {message}")


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """Runs the body on every process; where it fails on one, it fails on all, after all are done.

    Args:
      doing: what the body does, for the message of those that did not fail.

    Raises:
      RuntimeError: another process failed.
    """
    failed: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failed = error
    agree(failed, doing)


def same_number() -> int:
    """A random number, the same on every process."""
    return int(exchange("a common number", str(secrets.randbits(32)))[0])


def total(numbers: Sequence[int]) -> Callable[[], list[int]]:
    """The sums of the processes' whole numbers (each below 2³¹), on every process.

    By the devices: cheap enough for every step. The sums are under way when this returns and are
    waited for by calling what it returns, so that the next step can be sent out first.
    """
    if jax.process_count() == 1:
        return lambda: list(numbers)
    mesh, gather = _gatherer()
    mine = np.asarray(numbers, np.int32)[None]
    whole = gather(multihost_utils.host_local_array_to_global_array(mine, mesh, P("process")))
    # Added up here: the devices have no 64-bit integers.
    return lambda: [int(n) for n in np.asarray(whole).sum(axis=0, dtype=np.int64)]


@functools.cache
def _gatherer() -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
    """A mesh with an axis of processes, and what gathers over it; kept, to compile it once."""
    devices = np.array(sorted(jax.devices(), key=lambda one: (one.process_index, one.id)))
    mesh = Mesh(devices.reshape(jax.process_count(), -1), ("process", "device"))
    return mesh, jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
