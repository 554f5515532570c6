"""Initializes `jax.distributed` from the environment: explicit variables, Slurm, MPI, Cloud TPU."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from typing import Any

import jax

from jaxalign.parallel.distributed import heartbeat
from jaxalign.parallel.distributed.service import seconds
from jaxalign.parallel.jax_private import on_cloud_tpu_vm

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
JOIN = "JAXALIGN_JOIN_SECONDS"
"""Seconds that a process waits for the others to start; 600 by default."""

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def start() -> None:
    """Initializes `jax.distributed` if the environment describes a job of several processes.

    It uses the first of these that is set (see docs/launching.md):

    1. Explicit: `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
       `JAX_PROCESS_ID`. `JOB_COMPLETION_INDEX`, which Kubernetes sets in Indexed Jobs and JobSets,
       replaces `JAX_PROCESS_ID`. `JAX_NUM_PROCESSES=1` without an address means one process,
       whatever else is set.
    2. Slurm (a step of several tasks) and Open MPI, which JAX detects. A task that is alone on its
       node takes all devices of the node; several tasks take one each. Open MPI 5 publishes no
       address: set `JAX_COORDINATOR_ADDRESS`.
    3. Cloud TPU: GKE's variables (`TPU_WORKER_HOSTNAMES`), or the metadata of a TPU VM.

    With one process, it does nothing. Call it before the first use of a device.

    Raises:
      ValueError: an incomplete setting, or one that is not a number.
      RuntimeError: the other processes did not start in time.
    """
    if not jax.distributed.is_initialized():
        arguments = _arguments()
        if arguments is None:
            return
        patience = heartbeat.lost_after()
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=seconds(JOIN, 600),
            # Longer than our own heartbeat's timeout, because our message names the machine. The
            # service polls twice in this time, so it may react after little more than half of it.
            heartbeat_timeout_seconds=2 * patience + 15,
        )
    heartbeat.begin()


def _arguments() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None: a job of one process."""
    if COUNT in os.environ:
        return _explicit()
    # Variables of the Slurm step, not of the job: a shell inside an allocation is one process.
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        one_per_node = _number("SLURM_STEP_NUM_TASKS", 1) == _number("SLURM_STEP_NUM_NODES", 0)
        return {"local_device_ids": []} if one_per_node else {}
    if _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        return _open_mpi()
    hosts = [os.environ.get(n, "") for n in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")]
    slices = _number("MEGASCALE_NUM_SLICES", 1)
    if any("," in names for names in hosts) or slices > 1 or _pod_of_vms():
        return {}
    return None


def _explicit() -> dict[str, Any] | None:
    count = _number(COUNT, 1)
    if count == 1 and ADDRESS not in os.environ:
        return None
    index = INDEX if INDEX in os.environ else "JOB_COMPLETION_INDEX"
    missing = [name for name in (ADDRESS, INDEX) if name not in os.environ]
    if index in os.environ and INDEX in missing:
        missing.remove(INDEX)
    if missing:
        raise ValueError(
            f"{COUNT} is set but {' and '.join(missing)} is not; set all three, or none"
        )
    process_id = _number(index, 0)
    if process_id >= count:
        raise ValueError(f"{index}={process_id}: wanted 0 to {count - 1}, as {COUNT}={count}")
    return {
        "coordinator_address": os.environ[ADDRESS],
        "num_processes": count,
        "process_id": process_id,
        # Without this, JAX on Kubernetes would need the Kubernetes client library to detect the
        # cluster.
        "cluster_detection_method": "deactivate",
    }


def _open_mpi() -> dict[str, Any]:
    """JAX reads the address that Open MPI 4's launcher publishes; Open MPI 5 publishes none."""
    one_per_node = _number("OMPI_COMM_WORLD_LOCAL_SIZE", 0) == 1
    devices: dict[str, Any] = {"local_device_ids": []} if one_per_node else {}
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return devices
    if ADDRESS not in os.environ:
        raise ValueError(
            f"Open MPI started {os.environ['OMPI_COMM_WORLD_SIZE']} processes but says no address "
            f"that they can meet at; set {ADDRESS}=host:port of the first one, e.g. with "
            f"mpirun -x {ADDRESS}=$(hostname):8476"
        )
    if not one_per_node:
        devices = {"local_device_ids": [_number("OMPI_COMM_WORLD_LOCAL_RANK", 0)]}
    return devices | {
        "coordinator_address": os.environ[ADDRESS],
        "num_processes": _number("OMPI_COMM_WORLD_SIZE", 1),
        "process_id": _number("OMPI_COMM_WORLD_RANK", 0),
        "cluster_detection_method": "deactivate",
    }


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.strip().isdecimal():
        raise ValueError(f"{name}={text!r}: wanted a whole number")
    return int(text)


def _pod_of_vms() -> bool:
    """Whether this TPU VM is one of several in a slice or multislice, by its metadata."""
    if not on_cloud_tpu_vm() or "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    workers = _metadata("worker-network-endpoints")
    slices = [line for line in _metadata("tpu-env").splitlines() if "MEGASCALE_NUM_SLICES" in line]
    several = bool(slices) and slices[0].partition(":")[2].strip(" '\"") not in ("", "1")
    return "," in workers or several


def _metadata(name: str) -> str:
    """A value of Google's metadata server; "" if there is no such server (Kaggle, Colab)."""
    request = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return response.read().decode()
    except (urllib.error.URLError, TimeoutError, OSError):
        return ""
