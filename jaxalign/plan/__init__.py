"""Will it fit, and how fast may it be? Compiles a run's real programs for named devices.

Everything is abstract: the model is read from `config.json` (or a GGUF file's metadata) alone, and
parameters, optimizer state and batches are shapes with the layout that a run would give them. The
devices may be absent: for TPUs and GPUs a compiler is enough (extras `plan-tpu` and `plan-gpu`).

SFT and reward modelling compile their step, DPO and KTO also what they ask of the reference, PPO
all of an iteration: reading prompts, writing answers, scoring, experience, update.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.parallel.chips import GIB, chip_of
from jaxalign.parallel.sharding import row_axes, row_shards
from jaxalign.plan.costs import Costs, Traffic
from jaxalign.plan.parts import PARTS, HostArray, Parts
from jaxalign.plan.programs import (
    DoesNotFit,
    Program,
    Say,
    compile_programs,
    device_bytes,
    train_state,
)
from jaxalign.plan.roofline import Speed, estimate
from jaxalign.plan.search import candidates
from jaxalign.plan.table import show
from jaxalign.plan.topology import find_devices, nearest_mesh, next_that_holds, parse_topology

__all__ = [
    "Costs",
    "Plan",
    "Program",
    "Traffic",
    "find_devices",
    "make_plan",
    "parse_topology",
    "search_plans",
]

KINDS = (
    "params", "frozen", "optimizer", "models", "batch", "cache", "temporary", "other",
)  # fmt: skip
"""Kinds of memory, in the order of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device needs and does in a step (an iteration, in PPO); memory in bytes.

    The memory is that of the moment when most is needed: while the program named by `peak` runs.

    Attributes:
      algorithm: "sft", "reward", "dpo", "kto" or "ppo".
      topology: as it was named; None for the devices that are present.
      devices: how many of which kind.
      mesh: sizes of the mesh axes.
      params: trained parameters.
      frozen: the base under adapters, else 0.
      optimizer: optimizer state.
      models: models beside the step: DPO's reference where it is not the base under adapters,
        PPO's reference and reward model.
      batch: data: in PPO the rollout and one mini-batch of it.
      cache: keys and values of the rollout.
      temporary: gradients, activations, whatever the compiler keeps for the length of a program.
      other: padding of the arguments to the device's tiles, the step counter, metrics.
      total: all of it. The program's share is the compiler's own account (arguments, temporaries
        and outputs that replace no argument).
      host: bytes of it in the host's memory instead, not in the total.
      capacity: what the device has; None where it is not known (CPUs).
      fits: whether the total is within it; None where it is not known.
      peak: the program that needs most.
      compile_seconds: tracing and compiling, all programs.
      tokens: that the update learns from, prompts included, on all devices.
      costs: FLOPs, bytes and collectives of a step or iteration, on one device.
      speed: what they take at best; None where the device's speed is not known.
      programs: what was compiled.
      notes: what was assumed.
    """

    algorithm: str
    topology: str | None
    devices: str
    mesh: dict[str, int]
    params: int
    frozen: int
    optimizer: int
    models: int
    batch: int
    cache: int
    temporary: int
    other: int
    total: int
    host: int
    capacity: int | None
    fits: bool | None
    peak: str
    compile_seconds: float
    tokens: int
    costs: Costs
    speed: Speed | None
    programs: tuple[Program, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return show(self, KINDS)


def make_plan(
    algorithm: str, config: Any, topology: str | None = None, say: Say = lambda text: None
) -> Plan:
    """Compiles the programs of a run and reads the compiler's account of them.

    Args:
      algorithm: "sft", "reward", "dpo", "kto" or "ppo".
      config: from `load_config(algorithm, …)`.
      topology: see `parse_topology`; None: the devices that are present.
      say: is told what is going on.

    Raises:
      ValueError: no such devices or no compiler for them, no such model, sizes that do not divide,
        or something that cannot fit into the devices; with the nearest that would do.
    """
    if algorithm not in PARTS:
        raise ValueError(f"algorithm={algorithm!r}: wanted one of {', '.join(PARTS)}")
    if config.mesh.apart:
        raise ValueError(
            f"mesh.apart={config.mesh.apart}: a plan is of devices that all do the same; plan the "
            "rest with as many devices fewer and without it"
        )
    with config.mesh.use_rules():
        return _make_plan(algorithm, config, topology, say)


def _make_plan(algorithm: str, config: Any, topology: str | None, say: Say) -> Plan:
    mesh = _mesh(config, topology)
    _check_rows(config, mesh)
    parts = PARTS[algorithm](config, mesh)
    sizes = resident_bytes(parts, mesh)
    chip = chip_of(mesh.devices.flat[0].device_kind)
    capacity = None if chip is None else chip.memory
    _check_resident(sizes, capacity, mesh, topology)
    try:
        programs = compile_programs(algorithm, config, mesh, parts, say)
    except DoesNotFit as error:
        raise ValueError(f"{error}; {_remedy(error.over, mesh, topology)}") from error

    peak = max(programs, key=lambda program: program.extra)
    for name in ("batch", "cache", "temporary", "other"):
        sizes[name] = getattr(peak, name)
    total = sum(sizes.values())
    costs = sum((program.costs * program.times for program in programs), Costs())
    return Plan(
        algorithm=algorithm,
        topology=topology,
        devices=f"{mesh.size} × {mesh.devices.flat[0].device_kind}",
        mesh=dict(mesh.shape),
        total=total,
        host=device_bytes((train_state(parts, mesh), parts.models), host=True),
        capacity=capacity,
        fits=None if capacity is None else total <= capacity,
        peak=peak.name,
        compile_seconds=sum(program.seconds for program in programs),
        tokens=_tokens(algorithm, config),
        costs=costs,
        speed=None
        if chip is None
        else estimate(programs, chip, mesh.size, _tokens(algorithm, config)),
        programs=tuple(programs),
        notes=(*parts.notes, *_unseen(train_state(parts, mesh), parts.models)),
        **sizes,
    )


def search_plans(
    algorithm: str, config: Any, topology: str, say: Say = lambda text: None, *, count: int = 3
) -> list[tuple[tuple[str, ...], Plan]]:
    """The settings under which a run is fastest: many estimated, the best few compiled.

    Tried are shapes of the mesh, remat policies, micro-batches, and moments in 8 bit beside those
    of the configuration; rows, lengths and all else stay, so that what is learned stays too.

    Args:
      algorithm: as in `make_plan`.
      config: where to start.
      topology: see `parse_topology`; a kind whose speed is known, not CPUs.
      say: is told what is going on.
      count: plans to find.

    Returns:
      (overrides, plan) of those that fit, most tokens a second first.

    Raises:
      ValueError: devices of unknown speed, or nothing that fits.
    """
    devices = find_devices(topology)
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(f"--search on {topology!r}: the speed of these devices is not known")
    with config.mesh.use_rules():
        found = candidates(algorithm, config, devices, chip)
    say(f"{len(found)} settings may fit; compiling the best")
    plans: list[tuple[float, tuple[str, ...], Plan]] = []
    for candidate in found[: 3 * count]:
        say(f"trying {' '.join(candidate.overrides)}")
        try:
            plan = make_plan(algorithm, candidate.config, topology, say)
        except ValueError as error:
            say(f"no: {error}")
            continue
        if plan.fits and plan.speed is not None:
            plans.append((plan.speed.tokens_per_second, candidate.overrides, plan))
        if len(plans) == count:
            break
    if not plans:
        near = next_that_holds(parse_topology(topology), 2 * len(devices))
        raise ValueError(
            f"--search on {topology!r}: nothing was found that fits; try {near or 'LoRA'}"
        )
    plans.sort(key=lambda one: -one[0])
    return [(overrides, plan) for _, overrides, plan in plans]


def _unseen(*trees: Any) -> list[str]:
    """What to say where the compiler has no notion of the host's memory."""
    away = [x for x in jax.tree.leaves(trees) if isinstance(x, HostArray)]
    if not away or away[0].sharding.memory_kind is not None:
        return []
    return [
        "ahead of time this compiler knows no host memory: a program is taken to hold on the "
        "device all that it reads of what is offloaded"
    ]


def resident_bytes(parts: Parts, mesh: Mesh) -> dict[str, int]:
    """What lies on a device all the time, by kind."""
    return {
        "params": device_bytes(parts.params),
        "frozen": device_bytes(parts.frozen),
        "optimizer": device_bytes(train_state(parts, mesh).opt_state),
        "models": sum(device_bytes(tree) for tree in parts.models),
    }


def _tokens(algorithm: str, config: Any) -> int:
    if algorithm == "ppo":
        length = config.data.length + config.ppo.max_new_tokens
        return config.data.rows * config.ppo.samples * length
    pairs = algorithm == "dpo" or (algorithm == "reward" and config.reward.objective == "pairs")
    return config.data.rows * config.data.length * (2 if pairs else 1)


def _mesh(config: Any, topology: str | None) -> Mesh:
    devices = find_devices(topology)
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    try:
        return config.mesh.make(devices)
    except ValueError as error:
        if any(size < -1 or not size for size in sizes):
            raise
        near = nearest_mesh(*sizes, len(devices))
        raise ValueError(f"{error}; the nearest mesh for {len(devices)} is {near}") from error


def _check_rows(config: Any, mesh: Mesh) -> None:
    unit = row_shards(mesh) * config.run.micro_batches * getattr(config, "minibatches", 1)
    if config.data.rows % unit:
        near = max(unit, round(config.data.rows / unit) * unit)
        raise ValueError(
            f"data.rows={config.data.rows} does not divide over {row_axes(mesh)}, micro-batches "
            f"and mini-batches on these devices; use a multiple of {unit}, the nearest is {near}"
        )


def _check_resident(
    sizes: dict[str, int], capacity: int | None, mesh: Mesh, topology: str | None
) -> None:
    """Refuses what cannot fit before anything is compiled."""
    need = sum(sizes.values())
    if capacity is None or need < capacity:
        return
    kinds = ", ".join(f"{name} {size / GIB:.1f}" for name, size in sizes.items() if size)
    raise ValueError(
        f"cannot fit: what stays in memory takes {need / GIB:.2f} GiB on each device ({kinds}), "
        f"which has {capacity / GIB:.2f}; {_remedy(1.15 * need / capacity, mesh, topology)}"
    )


def _remedy(over: float | None, mesh: Mesh, topology: str | None) -> str:
    near = None
    if topology is not None:
        near = next_that_holds(parse_topology(topology), math.ceil(mesh.size * (over or 2.0)))
    devices = "more devices" if near is None else f"the nearest topology that may hold it is {near}"
    return (
        f"{devices}; or larger run.micro_batches, model.remat=block, optimizer.moments=int8, fewer "
        "data.rows, shorter data.length, or LoRA"
    )
