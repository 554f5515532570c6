"""The time of a checkpoint: its bytes over the storage bandwidth of the hosts that share it.

    t = bytes / (hosts × bandwidth)

Every host writes and reads its own part. A save copies the arrays to host memory and continues in
the background; no step waits for it unless the next save starts before it is done.
"""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.sharding import Mesh

from jaxalign.types import TrainState

BANDWIDTH = 1e9
"""The default bytes/s from a host to its storage: a bucket, or a fast shared file system."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a run.

    Attributes:
      bytes: bytes of trained parameters and optimizer state; a frozen base is not saved.
      hosts: the number of hosts that share the work.
      bandwidth: a host's bandwidth to its storage, bytes/s, each way.
      seconds: the time to write it, and to read it back.
    """

    bytes: int
    hosts: int
    bandwidth: float
    seconds: float


def estimate_checkpoint(state: TrainState, mesh: Mesh, bandwidth: float = BANDWIDTH) -> Checkpoint:
    """The size and time of a checkpoint of a train state.

    Args:
      state: of shapes.
      mesh: the run's mesh.
      bandwidth: of a host to its storage, bytes/s.

    Raises:
      ValueError: the bandwidth is not positive.
    """
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"storage bandwidth {bandwidth:g} bytes/s: wanted a positive number")
    saved = (state.step, state.params, state.opt_state)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(saved))
    hosts = len({device.process_index for device in mesh.devices.flat})
    return Checkpoint(
        bytes=size, hosts=hosts, bandwidth=bandwidth, seconds=size / (hosts * bandwidth)
    )
