"""Searches for the fastest settings on given devices: estimates many, compiles the best few.

The estimate needs no compiler. Memory: resident arrays (exact, from shapes), gradients in float32,
activations that the remat policy keeps, keys and values. Time: the roofline over model FLOPs with
recomputation, memory traffic of weights and activations, and the collectives of fully sharded data
parallelism and tensor parallelism (docs/plan.md has the formulas). The remaining candidates are
compiled, best first, until enough of them fit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.models.flops import row_flops
from jaxalign.models.layer_loop import REMAT
from jaxalign.parallel.chips import Chip, chip_of
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import row_shards
from jaxalign.plan.make import frozen_models, make_plan, run_shapes
from jaxalign.plan.programs import Log, device_bytes
from jaxalign.plan.result import Plan
from jaxalign.plan.storage import BANDWIDTH
from jaxalign.plan.topology import find_devices, next_that_holds, parse_topology
from jaxalign.run.tasks import ALGORITHMS
from jaxalign.run.tasks.parts import Parts
from jaxalign.run.tasks.ppo import RolloutParts
from jaxalign.run.tasks.shapes import full_batch
from jaxalign.types import TrainState

KEPT = {"none": 34, "dots": 12, "block": 1}
"""Values of the compute dtype that a policy keeps of a layer, in units of tokens × hidden size:
Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198, eq. 2, without the T × T scores, which
are formed again) for "none"; results of matrix products for "dots"; its input for "block"."""

AGAIN = {"none": 0.0, "dots": 0.05, "block": 1.0}
"""The fraction of a forward pass that the backward pass recomputes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One setting and its estimate.

    Attributes:
      overrides: `key=value`, as on the command line.
      config: the config with the overrides.
      memory: estimated bytes per device.
      seconds: estimated time of a step.
    """

    overrides: tuple[str, ...]
    config: Any
    memory: float
    seconds: float


def search_plans(
    algorithm: str,
    config: Any,
    topology: str,
    log: Log = lambda text: None,
    *,
    count: int = 3,
    storage: float = BANDWIDTH,
) -> list[tuple[tuple[str, ...], Plan]]:
    """Finds the settings with which a run is fastest: estimates many, compiles the best few.

    It tries mesh shapes, remat policies, micro-batches, and 8-bit moments beside the configured
    ones. Rows, lengths and everything else stay the same, so that training does not change.

    Args:
      algorithm: as in `make_plan`.
      config: where to start.
      topology: see `parse_topology`; a kind whose speed is known, not CPUs.
      log: called with a line about the progress.
      count: the number of plans to find.
      storage: as in `make_plan`.

    Returns:
      (overrides, plan) for settings that fit, highest tokens per second first.

    Raises:
      ValueError: the devices' speed is unknown, or nothing fits.
    """
    devices = find_devices(topology)
    chip = chip_of(devices[0].device_kind)
    if chip is None:
        raise ValueError(f"--search on {topology!r}: the speed of these devices is not known")
    with config.mesh.use_rules():
        found = candidates(algorithm, config, devices, chip)
    log(f"{len(found)} settings may fit; compiling the best")
    plans: list[tuple[float, tuple[str, ...], Plan]] = []
    for candidate in found[: 3 * count]:
        log(f"trying {' '.join(candidate.overrides)}")
        try:
            plan = make_plan(algorithm, candidate.config, topology, log, storage=storage)
        except ValueError as error:
            log(f"no: {error}")
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
    plans.sort(key=lambda plan: -plan[0])
    return [(overrides, plan) for _, overrides, plan in plans]


def meshes(count: int) -> Iterator[tuple[int, int, int]]:
    """Mesh sizes (data, fsdp, tensor) for a number of devices: tensor up to 8, data up to 64."""
    for tensor, data in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)):
        if count % (tensor * data) == 0:
            yield data, count // (tensor * data), tensor


def candidates(
    algorithm: str, config: Any, devices: list[jax.Device], chip: Chip
) -> list[Candidate]:
    """All meshes, remat policies, micro-batches and moments that might fit, best first."""
    found = []
    minibatches = getattr(config, "minibatches", 1)
    for sizes in meshes(len(devices)):
        mesh = make_mesh(*sizes, devices=devices)
        shaped = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **_named(sizes)))
        smaller = ("int8",) if config.optimizer.name == "adamw" else ()
        for moments in dict.fromkeys((config.optimizer.moments, *smaller)):
            one = dataclasses.replace(
                shaped, optimizer=dataclasses.replace(config.optimizer, moments=moments)
            )
            try:
                state, parts = run_shapes(algorithm, one, mesh)
            except ValueError:
                continue  # heads or widths that this mesh does not divide
            held = device_bytes(state) + device_bytes(frozen_models(state, parts))
            unit = row_shards(mesh) * minibatches
            for remat, micro in itertools.product(REMAT, (1, 2, 4, 8, 16, 32, 64)):
                if remat not in KEPT or config.data.rows % (unit * micro):
                    continue
                memory, seconds = _estimate(
                    algorithm, one, state, parts, mesh, chip, remat, micro, held
                )
                if memory > 1.1 * chip.memory:
                    continue
                found.append(
                    Candidate(
                        overrides=_overrides(sizes, remat, micro, moments, config),
                        config=dataclasses.replace(
                            one,
                            model=dataclasses.replace(one.model, remat=remat),
                            run=dataclasses.replace(one.run, micro_batches=micro),
                        ),
                        memory=memory,
                        seconds=seconds,
                    )
                )
    return sorted(found, key=lambda c: (c.seconds, c.memory))


def _named(sizes: tuple[int, int, int]) -> dict[str, int]:
    return dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))


def _overrides(
    sizes: tuple[int, int, int], remat: str, micro: int, moments: str, config: Any
) -> tuple[str, ...]:
    overrides = [f"mesh.{name}={size}" for name, size in _named(sizes).items()]
    overrides += [f"model.remat={remat}", f"run.micro_batches={micro}"]
    if moments != config.optimizer.moments:
        overrides.append(f"optimizer.moments={moments}")
    return tuple(overrides)


def _estimate(
    algorithm: str, config: Any, state: TrainState, parts: Parts, mesh: Mesh, chip: Chip,
    remat: str, micro: int, held: int,
) -> tuple[float, float]:  # fmt: skip
    """Bytes on a device, and seconds of an update (in PPO, of all updates of an iteration)."""
    shape, length, updates, trained = parts.policy.config, config.data.length, 1, 1
    if isinstance(parts, RolloutParts):
        length += parts.options.max_new_tokens
        updates = config.ppo_epochs * config.minibatches
        rows = config.sequences // config.minibatches
        trained = 2  # policy and critic
    else:
        one_row = full_batch(ALGORITHMS[algorithm].shapes(config), 1)
        rows = round(parts.update_work(one_row).tokens * config.data.rows / length)
    tensor = mesh.shape["tensor"]
    tokens = rows * length / row_shards(mesh)  # of an update, on one device
    width = 2 * shape.hidden_size
    gradients = device_bytes(state.params) * (1 if micro == 1 else 2)
    kept = shape.num_layers * width * KEPT[remat] / (tensor if remat != "block" else 1)
    # One layer's activations exist in full, whatever the remat policy keeps.
    memory = held + gradients + tokens / micro * (kept + width * KEPT["none"] / tensor)
    flops = trained * row_flops(shape, rows, length, head=True) * (3 + AGAIN[remat]) / mesh.size
    weights = 2 * sum(x.size for x in jax.tree.leaves(state.params)) / tensor  # bfloat16
    shards = mesh.shape["fsdp"]
    passes = 2 + (AGAIN[remat] > 0.5)
    # Weights are all-gathered in each pass; gradients (float32) are reduce-scattered per
    # micro-batch and all-reduced over replicas; tensor parallelism all-reduces activations twice
    # per layer and direction.
    sent = micro * (passes + 2) * weights * (shards - 1) / shards
    sent += 2 * 2 * weights / shards * (1 - 1 / mesh.shape["data"])
    sent += 4 * trained * passes * shape.num_layers * tokens * width * (tensor - 1) / tensor
    moved = micro * 3 * weights + 3 * held + 2 * tokens * kept
    resources = (flops / chip.flops, moved / chip.bandwidth, sent / chip.inner)
    return memory, updates * max(resources)
