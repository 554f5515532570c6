"""The result of a plan."""

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
    """What one device needs and does in a step (in PPO, an iteration); memory in bytes.

    The memory is the peak, which is reached while the program named by `peak` runs.

    Attributes:
      algorithm: key of `jaxalign.run.tasks.ALGORITHMS`.
      topology: the topology's name; None for the present devices.
      devices: the number and kind of devices.
      mesh: sizes of the mesh axes.
      params: trained parameters.
      frozen: the base under adapters, else 0.
      optimizer: optimizer state.
      models: other models: DPO's reference if it is not the base under adapters, PPO's reference
        and reward model.
      batch: data: in PPO the rollout and one mini-batch of it.
      cache: keys and values of the rollout.
      temporary: gradients, activations and other temporaries of a program.
      other: padding of the arguments to the device's tiles, the step counter, metrics.
      total: the sum. The program's share comes from the compiler's own analysis (arguments,
        temporaries and outputs that replace no argument).
      host: bytes that are in host memory instead, not in the total.
      capacity: the device's memory; None if unknown (CPUs).
      fits: whether the total is within the capacity; None if unknown.
      peak: the program that needs the most memory.
      compile_seconds: time of tracing and compiling all programs.
      tokens: tokens that the update trains on, including prompts, on all devices.
      costs: FLOPs, bytes and collectives of a step or iteration, on one device.
      speed: the best possible times; None if the device's speed is unknown.
      head_chunk: positions, over all rows, that the vocabulary head computes at a time in an
        update; None without a head.
      decode: the roofline of decoding, for several numbers of slots; () if nothing is generated or
        the device's speed is unknown.
      checkpoint: a checkpoint's bytes and time.
      programs: the compiled programs.
      notes: the assumptions.
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
