"""Joining the other processes of a job, by what the environment says of them."""

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
"""How long a process waits for the others to start; by default 600 seconds."""

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


def start() -> None:
    """Joins the other processes of the job, if the environment names any. docs/launching.md.

    In this order:

    1. explicit: `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and
       `JAX_PROCESS_ID`; the last may come from `JOB_COMPLETION_INDEX`, which Kubernetes sets in
       Indexed Jobs and JobSets. `JAX_NUM_PROCESSES=1` alone: one process, whatever else there is.
    2. Slurm (a step of several tasks) and Open MPI, found by JAX. A task that is alone on its
       node takes all of its devices; several take one each. Open MPI 5 says no address: set
       `JAX_COORDINATOR_ADDRESS`.
    3. Cloud TPU: GKE's variables (`TPU_WORKER_HOSTNAMES`), or the metadata of a TPU VM.

    Alone, this does nothing. Call it before the first use of a device.

    Raises:
      ValueError: settings that are incomplete, or no numbers.
      RuntimeError: the others did not come in time.
    """
    if not jax.distributed.is_initialized():
        found = _found()
        if found is None:
            return
        patience = heartbeat.lost_after()
        jax.distributed.initialize(
            **found,
            initialization_timeout=seconds(JOIN, 600),
            # The service is behind our own watch, which can say which machine it was. It hears of a
            # process twice in this time, so it may notice after a little more than half of it.
            heartbeat_timeout_seconds=2 * patience + 15,
        )
    heartbeat.begin()


def _found() -> dict[str, Any] | None:
    """Arguments for `jax.distributed.initialize`; None: this process is alone."""
    if COUNT in os.environ:
        return _explicit()
    # Of the step, not of the job: a shell inside an allocation is one process.
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1:
        alone = _number("SLURM_STEP_NUM_TASKS", 1) == _number("SLURM_STEP_NUM_NODES", 0)
        return {"local_device_ids": []} if alone else {}
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
    at = _number(index, 0)
    if at >= count:
        raise ValueError(f"{index}={at}: wanted 0 to {count - 1}, as {COUNT}={count}")
    return {
        "coordinator_address": os.environ[ADDRESS],
        "num_processes": count,
        "process_id": at,
        # What is given is not to be looked up: on Kubernetes JAX would ask for a client library.
        "cluster_detection_method": "deactivate",
    }


def _open_mpi() -> dict[str, Any]:
    """JAX reads the address of Open MPI 4's launcher; that of 5 has none to read."""
    alone = _number("OMPI_COMM_WORLD_LOCAL_SIZE", 0) == 1
    devices: dict[str, Any] = {"local_device_ids": []} if alone else {}
    if "OMPI_MCA_orte_hnp_uri" in os.environ:
        return devices
    if ADDRESS not in os.environ:
        raise ValueError(
            f"Open MPI started {os.environ['OMPI_COMM_WORLD_SIZE']} processes but says no address "
            f"that they can meet at; set {ADDRESS}=host:port of the first one, e.g. with "
            f"mpirun -x {ADDRESS}=$(hostname):8476"
        )
    if not alone:
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
    """Whether this is one of several TPU VMs that gcloud made together."""
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
    """What Google's metadata server says; "" where there is none (Kaggle, Colab)."""
    asked = urllib.request.Request(_METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, TimeoutError, OSError):
        return ""
