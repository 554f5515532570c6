"""Trains on GKE: writes a JobSet for TPU slices or GPU nodes, and hands it to kubectl.

    python scripts/launch/gke_jobset.py --name mine --image REGION-docker.pkg.dev/P/R/jaxalign \
        --tpu tpu-v5-lite-podslice --topology 4x4 --claim runs -- \
        sft configs/sft.yaml run.folder=/mnt/shared/runs/mine
    python scripts/launch/gke_jobset.py --name mine --image … \
        --gpu nvidia-h100-80gb --nodes 2 --gpus 8 --claim runs -- sft configs/sft.yaml …

`--dry-run` prints the YAML and runs nothing. `--fetch` makes a Job that downloads what the run
reads into the shared cache, once. What follows `--` goes to `jaxalign` as it stands.
docs/launching.md has the steps.
"""

from __future__ import annotations

import argparse
import math
import re
import subprocess
import sys
from typing import Any

import yaml

PORT = 8476  # where process 0 of a GPU job is met
SHARED = "/mnt/shared"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,36}[a-z0-9])?")


def jobset(options: argparse.Namespace) -> dict[str, Any]:
    """The JobSet of these options, as nested values."""
    hosts = _hosts(options)
    container: dict[str, Any] = {
        "name": "jaxalign",
        "image": options.image,
        "command": ["python3", "-u", "-m", "jaxalign", *_command(options)],
        "env": _environment(options, hosts),
        "ports": [{"containerPort": port} for port in _ports(options)],
        "resources": _resources(options),
        "volumeMounts": [],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        # A checkpoint is written after SIGTERM: time for it.
        "terminationGracePeriodSeconds": 300,
        "nodeSelector": _nodes(options),
        "containers": [container],
        "volumes": [],
    }
    if options.gpu:
        # NCCL talks through shared memory within a node; the default of containers is 64 MB.
        _mount(pod, "shm", "/dev/shm", {"emptyDir": {"medium": "Memory"}})
        pod["tolerations"] = [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
    if options.claim:
        claim = {"persistentVolumeClaim": {"claimName": options.claim}}
        _mount(pod, "shared", SHARED, claim)
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    annotations = {}
    if options.tpu:
        # A slice is a node pool: all pods of a job go to one, and no two jobs to the same.
        annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": options.name, "annotations": annotations},
        "spec": {
            "failurePolicy": {"maxRestarts": options.restarts},
            "replicatedJobs": [
                {
                    "name": "hosts",
                    "replicas": options.slices,
                    "template": {
                        "spec": {
                            "parallelism": hosts,
                            "completions": hosts,
                            "completionMode": "Indexed",
                            # One host's end is everybody's: the JobSet starts all of them again.
                            "backoffLimit": 0,
                            "template": {"spec": pod},
                        }
                    },
                }
            ],
        },
    }


def fetch_job(options: argparse.Namespace) -> dict[str, Any]:
    """A Job of one pod without accelerators that downloads what the run reads."""
    container: dict[str, Any] = {
        "name": "jaxalign",
        "image": options.image,
        "command": ["python3", "-u", "-m", "jaxalign", "fetch", *options.command],
        "env": [*_given(options), {"name": "JAX_PLATFORMS", "value": "cpu"}],
        "volumeMounts": [],
    }
    pod: dict[str, Any] = {"restartPolicy": "Never", "containers": [container], "volumes": []}
    _mount(pod, "shared", SHARED, {"persistentVolumeClaim": {"claimName": options.claim}})
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{options.name}-fetch"},
        "spec": {"backoffLimit": 2, "template": {"spec": pod}},
    }


def _given(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The variables of `--env`, `--secret`, `--hf-home` and `--offline`."""
    found: list[dict[str, Any]] = []
    if options.hf_home:
        found.append({"name": "HF_HOME", "value": options.hf_home})
    if options.offline:
        found += [{"name": name, "value": "1"} for name in OFFLINE]
    for text in options.env:
        name, _, value = text.partition("=")
        found.append({"name": name, "value": value})
    for text in options.secret:
        name, _, reference = text.partition("=")
        secret, _, key = reference.partition(":")
        source = {"secretKeyRef": {"name": secret, "key": key}}
        found.append({"name": name, "valueFrom": source})
    return found


def _command(options: argparse.Namespace) -> list[str]:
    """With restarts, a run goes on from its newest checkpoint, or begins where there is none."""
    if not options.restarts:
        return options.command
    pipeline = options.command[0] == "pipeline"
    return [*options.command, f"{'defaults.' if pipeline else ''}run.resume=auto"]


def _hosts(options: argparse.Namespace) -> int:
    if options.gpu:
        return options.nodes
    chips = math.prod(int(side) for side in options.topology.split("x"))
    if chips % options.chips:
        raise ValueError(
            f"--topology {options.topology} has {chips} chips, which do not divide into hosts of "
            f"--chips {options.chips}"
        )
    return chips // options.chips


def _environment(options: argparse.Namespace, hosts: int) -> list[dict[str, Any]]:
    given = _given(options)
    if options.tpu:
        return given  # GKE sets what JAX reads: TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, MEGASCALE_*
    # Of the first pod of the first job, within the domain that the JobSet makes.
    first = f"{options.name}-hosts-0-0.{options.name}:{PORT}"
    return [
        {"name": "JAX_COORDINATOR_ADDRESS", "value": first},
        {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
        # JAX_PROCESS_ID is JOB_COMPLETION_INDEX, which Kubernetes sets in Indexed Jobs.
        {"name": "XLA_PYTHON_CLIENT_MEM_FRACTION", "value": "0.92"},
        *given,
    ]


def _ports(options: argparse.Namespace) -> list[int]:
    # Of a TPU's runtime, of JAX's coordinator, of several slices.
    return [8471, 8482, 8080] if options.tpu else [PORT]


def _resources(options: argparse.Namespace) -> dict[str, Any]:
    name, count = (
        ("google.com/tpu", options.chips) if options.tpu else ("nvidia.com/gpu", options.gpus)
    )
    limits: dict[str, Any] = {name: count}
    if options.memory:
        limits["memory"] = options.memory
    resources: dict[str, Any] = {"limits": limits}
    if options.cpu:
        # Asked for and not limited: what the node has to spare may be used to read data.
        resources["requests"] = {"cpu": options.cpu}
    return resources


def _nodes(options: argparse.Namespace) -> dict[str, str]:
    if options.gpu:
        nodes = {"cloud.google.com/gke-accelerator": options.gpu}
    else:
        nodes = {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        }
    return nodes | ({"cloud.google.com/gke-spot": "true"} if options.spot else {})


def _mount(pod: dict[str, Any], name: str, path: str, source: dict[str, Any]) -> None:
    pod["volumes"].append({"name": name} | source)
    pod["containers"][0]["volumeMounts"].append({"name": name, "mountPath": path})


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options, and under `command` what follows `--`."""
    own, command = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        own, command = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the JobSet; also the hosts' domain")
    parser.add_argument("--image", required=True, help="container image with jaxalign installed")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tpu", metavar="TYPE", help="such as tpu-v5-lite-podslice, tpu-v5p-slice")
    kind.add_argument("--gpu", metavar="TYPE", help="such as nvidia-h100-80gb")
    parser.add_argument("--topology", help="of a TPU slice, such as 4x4 or 2x2x2")
    parser.add_argument("--chips", type=int, default=4, help="TPU chips of a host (default 4)")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices (default 1)")
    parser.add_argument("--nodes", type=int, help="GPU nodes")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a node (default 8)")
    parser.add_argument("--claim", help=f"PersistentVolumeClaim that all hosts mount at {SHARED}")
    parser.add_argument("--memory", help="limit of a host, such as 300Gi")
    parser.add_argument("--cpu", help="cores of a host that are asked for, such as 100")
    parser.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="variable; repeatable"
    )
    parser.add_argument(
        "--secret",
        action="append",
        default=[],
        metavar="NAME=SECRET:KEY",
        help="variable from a Kubernetes secret, such as HF_TOKEN=hf:token; repeatable",
    )
    parser.add_argument("--hf-home", metavar="FOLDER", help=f"HF_HOME, such as {SHARED}/hf")
    parser.add_argument("--offline", action="store_true", help="ask nothing of the hub")
    parser.add_argument(
        "--fetch", action="store_true", help="a Job that fills the cache, in place of the run"
    )
    parser.add_argument("--service-account", help="Kubernetes service account, for buckets")
    parser.add_argument("--spot", action="store_true", help="nodes that may be taken away")
    parser.add_argument(
        "--restarts", type=int, default=3, help="how often all start again (default 3)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the YAML, apply nothing")
    options = parser.parse_args(own)
    options.command = command
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if not options.command:
        parser.error("nothing to run; give a command after --, such as: -- sft configs/sft.yaml")
    if not _NAME.fullmatch(options.name):
        parser.error(f"--name {options.name}: wanted at most 38 of a-z, 0-9 and -, a letter first")
    if options.tpu and not re.fullmatch(r"\d+(x\d+){1,2}", options.topology or ""):
        parser.error(f"--topology {options.topology}: wanted one such as 4x4 with --tpu")
    if options.gpu and not options.nodes:
        parser.error("--nodes: wanted a number of nodes with --gpu")
    for text in options.env:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", text, re.DOTALL):
            parser.error(f"--env {text}: wanted NAME=VALUE")
    for text in options.secret:
        if not re.fullmatch(r"[A-Za-z_]\w*=[a-z0-9.-]+:[\w.-]+", text):
            parser.error(f"--secret {text}: wanted NAME=SECRET:KEY")
    if options.fetch and not (options.claim and options.hf_home):
        parser.error(f"--fetch: wanted --claim and --hf-home below {SHARED} with it")
    for name, kind, default in (
        ("topology", "tpu", None),
        ("slices", "tpu", 1),
        ("chips", "tpu", 4),
        ("nodes", "gpu", None),
        ("gpus", "gpu", 8),
    ):
        if getattr(options, name) != default and not getattr(options, kind):
            parser.error(f"--{name}: has no meaning without --{kind}")
        if isinstance(getattr(options, name), int) and getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: wanted a positive number")


def main(arguments: list[str]) -> int:
    """Prints or applies the JobSet."""
    options = parse(arguments)
    try:
        made = fetch_job(options) if options.fetch else jobset(options)
        text = yaml.safe_dump(made, sort_keys=False)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        print("# to: kubectl apply -f -")
        print(text, end="")
        return 0
    return subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
