"""Several processes running one program: initialization, host collectives, joint failure.

`jax.distributed` connects the processes. Its key-value service carries the short texts exchanged
here; arrays use XLA collectives only.
"""

from jaxalign.parallel.distributed.collectives import (
    all_gather_text,
    all_reduce_sum,
    barrier,
    broadcast_random,
    fail_together,
    is_main,
    raise_on_all,
)
from jaxalign.parallel.distributed.consistency import (
    check_consistent,
    check_shared_folder,
    flatten,
)
from jaxalign.parallel.distributed.heartbeat import (
    Preempted,
    exit_if_failed,
    guard,
    job_failed,
    preempted,
)
from jaxalign.parallel.distributed.initialize import start
from jaxalign.parallel.distributed.session import session

__all__ = [
    "Preempted",
    "all_gather_text",
    "all_reduce_sum",
    "barrier",
    "broadcast_random",
    "check_consistent",
    "check_shared_folder",
    "exit_if_failed",
    "fail_together",
    "flatten",
    "guard",
    "is_main",
    "job_failed",
    "preempted",
    "raise_on_all",
    "session",
    "start",
]
