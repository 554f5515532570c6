"""Which settings make a run fastest on given devices: many are estimated, the best few compiled.

The estimate needs no compiler. Memory: what stays (exact, from shapes), gradients in float32,
activations that the remat policy keeps, keys and values; time: the roofline over model FLOPs with
recomputation, the weights' and activations' passes through memory, and the collectives of fully
sharded data parallelism and tensor parallelism (docs/plan.md has the formulas). What remains is
compiled, best first, until enough of them fit.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.models.decoder import REMAT
from jaxalign.models.flops import row_flops
from jaxalign.parallel.chips import Chip
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import row_shards
from jaxalign.plan.parts import PARTS, Parts
from jaxalign.plan.programs import device_bytes, train_state

KEPT = {"none": 34, "dots": 12, "block": 1}
"""Values of the compute dtype that a policy keeps of a layer, in units of tokens × hidden size:
Korthikanti et al. 2022 (https://arxiv.org/abs/2205.05198, eq. 2, without the T × T scores, which
are formed again) for "none"; results of matrix products for "dots"; its input for "block"."""

AGAIN = {"none": 0.0, "dots": 0.05, "block": 1.0}
"""Part of a forward pass that the backward pass repeats."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run, and its estimate.

    Attributes:
      overrides: `key=value`, as on the command line.
      config: with them.
      memory: bytes on a device, estimated.
      seconds: a step, estimated.
    """

    overrides: tuple[str, ...]
    config: Any
    memory: float
    seconds: float


def meshes(count: int) -> Iterator[tuple[int, int, int]]:
    """Mesh sizes (data, fsdp, tensor) for so many devices: tensor up to 8, data up to 64."""
    for tensor, data in itertools.product((1, 2, 4, 8), (1, 2, 4, 8, 16, 32, 64)):
        if count % (tensor * data) == 0:
            yield data, count // (tensor * data), tensor


def candidates(
    algorithm: str, config: Any, devices: list[jax.Device], chip: Chip
) -> list[Candidate]:
    """All meshes, remat policies, micro-batches and moments that may fit, best first."""
    found = []
    minibatches = getattr(config, "minibatches", 1)
    for sizes in meshes(len(devices)):
        mesh = make_mesh(*sizes, devices=devices)
        shaped = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **_named(sizes)))
        for moments in dict.fromkeys((config.optimizer.moments, "int8")):
            one = dataclasses.replace(
                shaped, optimizer=dataclasses.replace(config.optimizer, moments=moments)
            )
            try:
                parts = PARTS[algorithm](one, mesh)
            except ValueError:
                continue  # heads or widths that this mesh does not divide
            held = device_bytes(train_state(parts, mesh)) + sum(map(device_bytes, parts.models))
            unit = row_shards(mesh) * minibatches
            for remat, micro in itertools.product(REMAT, (1, 2, 4, 8, 16, 32, 64)):
                if remat not in KEPT or config.data.rows % (unit * micro):
                    continue
                memory, seconds = _estimate(algorithm, one, parts, mesh, chip, remat, micro, held)
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
    told = [f"mesh.{name}={size}" for name, size in _named(sizes).items()]
    told += [f"model.remat={remat}", f"run.micro_batches={micro}"]
    if moments != config.optimizer.moments:
        told.append(f"optimizer.moments={moments}")
    return tuple(told)


def _estimate(
    algorithm: str, config: Any, parts: Parts, mesh: Mesh, chip: Chip, remat: str, micro: int,
    held: int,
) -> tuple[float, float]:  # fmt: skip
    """Bytes on a device, and seconds of an update (in PPO, of all those of an iteration)."""
    model, _ = parts.roles["policy"]
    shape, sides = model.config, 2 if algorithm in ("dpo", "reward") else 1
    length = config.data.length
    answers, updates = config.data.rows, 1
    if algorithm == "ppo":
        answers *= config.ppo.samples
        length += config.ppo.max_new_tokens
        updates = config.ppo_epochs * config.minibatches
    rows = sides * answers // getattr(config, "minibatches", 1)
    tensor = mesh.shape["tensor"]
    tokens = rows * length / row_shards(mesh)  # of an update, on one device
    width = 2 * shape.hidden_size
    gradients = device_bytes(parts.params) * (1 if micro == 1 else 2)
    kept = shape.num_layers * width * KEPT[remat] / (tensor if remat != "block" else 1)
    # One layer is worked on whole, whatever is kept.
    memory = held + gradients + tokens / micro * (kept + width * KEPT["none"] / tensor)
    trained = 2 if algorithm == "ppo" else 1
    flops = trained * row_flops(shape, rows, length, head=True) * (3 + AGAIN[remat]) / mesh.size
    weights = 2 * sum(x.size for x in jax.tree.leaves(parts.params)) / tensor  # bfloat16
    shards = mesh.shape["fsdp"]
    passes = 2 + (AGAIN[remat] > 0.5)
    # Weights are gathered in each pass, gradients scattered (float32) each micro-batch and summed
    # over replicas; tensor parallelism sums activations twice a layer and direction.
    sent = micro * (passes + 2) * weights * (shards - 1) / shards
    sent += 2 * 2 * weights / shards * (1 - 1 / mesh.shape["data"])
    sent += 4 * trained * passes * shape.num_layers * tokens * width * (tensor - 1) / tensor
    moved = micro * 3 * weights + 3 * held + 2 * tokens * kept
    resources = (flops / chip.flops, moved / chip.bandwidth, sent / chip.inner)
    return memory, updates * max(resources)
