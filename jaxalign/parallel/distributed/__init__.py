"""Several processes, one program: joining them, talking among them, and failing together.

JAX's own runtime is the engine: `jax.distributed` connects the processes, its service holds the
few texts that they exchange here, and everything about arrays is a collective of XLA.
"""

from jaxalign.parallel.distributed.collectives import (
    agree,
    barrier,
    exchange,
    is_main,
    same_number,
    together,
    total,
)
from jaxalign.parallel.distributed.consistency import check_same, check_shared, flatten
from jaxalign.parallel.distributed.heartbeat import Preempted, broken, guard, leave, preempted
from jaxalign.parallel.distributed.initialize import start

__all__ = [
    "Preempted",
    "agree",
    "barrier",
    "broken",
    "check_same",
    "check_shared",
    "exchange",
    "flatten",
    "guard",
    "is_main",
    "leave",
    "preempted",
    "same_number",
    "start",
    "together",
    "total",
]
