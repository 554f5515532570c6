"""Several processes, one program: start, who am I, and waiting for the others."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils


def start() -> None:
    """Joins the other processes of the job, if the environment names any.

    Explicit settings come first: `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`. On Slurm, Open MPI and Cloud TPU pods JAX finds them itself. Alone, this does
    nothing. Call it before the first use of a device.
    """
    if jax.distributed.is_initialized():
        return
    if "JAX_NUM_PROCESSES" in os.environ:
        missing = [
            name for name in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID") if name not in os.environ
        ]
        if missing:
            raise ValueError(
                f"JAX_NUM_PROCESSES is set but {' and '.join(missing)} is not; "
                "set all three, or none"
            )
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=_integer("JAX_NUM_PROCESSES"),
            process_id=_integer("JAX_PROCESS_ID"),
        )
        return
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    # Of the step, not of the job: a shell inside an allocation is one process.
    started_by = [n for n in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE") if n in os.environ]
    if "," in workers or any(_integer(name) > 1 for name in started_by):
        jax.distributed.initialize()


def _integer(name: str) -> int:
    text = os.environ[name]
    if not text.strip().isdecimal():
        raise ValueError(f"{name}={text!r}: wanted a whole number")
    return int(text)


def is_main() -> bool:
    """Whether this process writes logs and single files."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here; alone, does nothing."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(error: BaseException | None, doing: str) -> None:
    """Waits until every process is here, and fails on all of them where one has failed.

    Args:
      error: what went wrong here, if anything; raised again on this process.
      doing: what was being done, for the others' message.

    Raises:
      RuntimeError: another process failed.
    """
    if jax.process_count() > 1:
        failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(error is not None)))
        if error is None and failed.size:
            raise RuntimeError(f"{doing} failed on process {failed[0]}; its own message says why")
    if error is not None:
        raise error


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
    number = np.asarray(secrets.randbits(32), np.uint32)
    if jax.process_count() > 1:
        number = multihost_utils.broadcast_one_to_all(number)
    return int(number)
