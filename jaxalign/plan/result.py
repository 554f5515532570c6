"""What a plan says."""

from __future__ import annotations

import dataclasses

from jaxalign.plan.costs import Costs
from jaxalign.plan.decode import DecodeStep
from jaxalign.plan.programs import Program
from jaxalign.plan.roofline import Speed
from jaxalign.plan.storage import Checkpoint
from jaxalign.plan.table import show

KINDS = (
    "params", "frozen", "optimizer", "models", "batch", "cache", "temporary", "other",
)  # fmt: skip
"""Kinds of memory, in the order of the table."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device needs and does in a step (an iteration, in PPO); memory in bytes.

    The memory is that of the moment when most is needed: while the program named by `peak` runs.

    Attributes:
      algorithm: key of `jaxalign.run.tasks.ALGORITHMS`.
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
      head_chunk: positions, of all rows, that the vocabulary head reads at a time in an update;
        None without a head.
      decode: the roofline of writing answers, for several numbers of slots; () where none are
        written or the device's speed is not known.
      checkpoint: bytes of a checkpoint, and the time that it takes.
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
    head_chunk: int | None
    decode: tuple[DecodeStep, ...]
    checkpoint: Checkpoint
    programs: tuple[Program, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return show(self, KINDS)
