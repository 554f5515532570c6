"""The command `plan`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys

from jaxalign.commands.algorithms import load_any_config
from jaxalign.commands.command import Command, config_arguments
from jaxalign.parallel.platforms import leave_accelerators_alone, split_cpu


def _arguments(parser: argparse.ArgumentParser) -> None:
    config_arguments(parser, "YAML file; the algorithm's name may stand before it")
    parser.add_argument(
        "--topology",
        "--devices",
        dest="topology",
        help="v4-8, v5e-16, v5p-128, v6e-256, v5e:4x4, h100:8, h100:8x16 (16 nodes), a100-80g:4, "
        "cpu:8; the devices that are present by default",
    )
    parser.add_argument("--json", action="store_true", help="for programs: bytes, FLOPs, seconds")
    parser.add_argument(
        "--storage-gbps",
        type=float,
        default=1.0,
        metavar="GB",
        help="bandwidth of a host to the storage of checkpoints, 10⁹ bytes a second; default 1.0",
    )
    parser.add_argument(
        "--search",
        nargs="?",
        type=int,
        const=3,
        metavar="N",
        help="find the N (3) fastest settings that fit: mesh, remat, micro-batches, moments",
    )


def _run(parsed: argparse.Namespace) -> None:
    if parsed.topology is not None:
        leave_accelerators_alone()
        split_cpu(parsed.topology)

    from jaxalign.plan import make_plan

    algorithm, config = load_any_config(parsed)
    if parsed.search is not None:
        _search(parsed, algorithm, config)
        return
    plan = make_plan(algorithm, config, parsed.topology, _log, storage=1e9 * parsed.storage_gbps)
    print(json.dumps(dataclasses.asdict(plan)) if parsed.json else plan)


def _search(parsed: argparse.Namespace, algorithm: str, config: object) -> None:
    from jaxalign.plan import search_plans

    if parsed.topology is None:
        raise ValueError("--search: wanted --topology with it, e.g. --topology v5p-128")
    if parsed.search < 1:
        raise ValueError(f"--search {parsed.search}: wanted 1 or more")
    plans = search_plans(
        algorithm,
        config,
        parsed.topology,
        _log,
        count=parsed.search,
        storage=1e9 * parsed.storage_gbps,
    )
    if parsed.json:
        rows = [{"overrides": o, "plan": dataclasses.asdict(plan)} for o, plan in plans]
        print(json.dumps(rows))
        return
    for overrides, plan in plans:
        print(f"{' '.join(overrides)}\n{plan}\n")


def _log(text: str) -> None:
    print(f"plan: {text}", file=sys.stderr, flush=True)


COMMAND = Command(
    "plan",
    "memory, traffic and speed of a run on named devices, before renting them",
    _arguments,
    _run,
)
