"""Several processes, one program: joining them, talking among them, and failing together.

JAX's own runtime is the engine: `jax.distributed` connects the processes, its service holds the
few texts that they exchange here, and everything about arrays is a collective of XLA.
"""

from jaxalign.distributed.joining import start
from jaxalign.distributed.same import check_same, check_shared, flatten
from jaxalign.distributed.talk import (
    agree,
    barrier,
    exchange,
    is_main,
    same_number,
    together,
    total,
)
from jaxalign.distributed.watch import Preempted, broken, guard, leave, preempted

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
