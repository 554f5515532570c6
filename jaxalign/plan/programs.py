"""Compiles programs from shapes and reads from the compiler what each one costs."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.models.lm_head import head_chunks
from jaxalign.parallel.sharding import axis_shards, row_shards, rows_sharding, use_mesh
from jaxalign.plan.costs import Costs, count_costs
from jaxalign.plan.loader import HostArray
from jaxalign.plan.topology import first_line, nodes_of
from jaxalign.run.tasks.parts import Parts
from jaxalign.run.tasks.shapes import full_batch
from jaxalign.types import TrainState

Log = Callable[[str], None]
"""Called with a line about the progress."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """One compiled program; bytes and costs are those of one device, for one run of it.

    Attributes:
      name: e.g. "update".
      times: how often it runs in a step, or in an iteration of PPO.
      batch: data in memory while it runs.
      cache: keys and values in memory while it runs.
      temporary: gradients, activations and other temporaries of the compiler.
      other: padding of the arguments to the device's tiles, results that replace no argument.
      costs: its costs.
      useful: FLOPs of the mathematics, on all devices together (see `models.flops`).
      seconds: time of tracing and compiling.
    """

    name: str
    times: int
    batch: int
    cache: int
    temporary: int
    other: int
    costs: Costs
    useful: float
    seconds: float

    @property
    def extra(self) -> int:
        """Bytes besides the parameters and optimizer states, which stay all the time."""
        return self.batch + self.cache + self.temporary + self.other


class DoesNotFit(ValueError):
    """The compiler rejected a program that needs more memory than the device has.

    Attributes:
      over: the needed memory as a multiple of the device's, if the compiler reports it.
    """

    def __init__(self, message: str, over: float | None):
        super().__init__(message)
        self.over = over


def device_bytes(tree: Any, *, host: bool = False) -> int:
    """Bytes of a tree on one device, by its sharding; unsharded arrays count whole.

    Args:
      tree: a tree of shapes.
      host: count the arrays in host memory instead.
    """

    def one(x: Any) -> int:
        if host != isinstance(x, HostArray):
            return 0
        shape = x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)
        return math.prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


def on_rows(tree: Any, mesh: Mesh) -> Any:
    """A batch of shapes with its rows split over the mesh."""
    split = rows_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), tree)


class Compiler:
    """Compiles programs one after the other and records their costs."""

    def __init__(self, mesh: Mesh, log: Log):
        self.mesh, self.log = mesh, log
        self.done: list[Program] = []

    def __call__(
        self, name: str, lower: Callable[[], Any], *, known: Any, batch: Any = (), cache: Any = (),
        times: int = 1, trips: int = 1, useful: float = 0.0, made: str = "other",
    ) -> Any:  # fmt: skip
        """Compiles a program and returns it.

        Args:
          name: the name to show.
          lower: makes the lowered program.
          known: arguments that are in memory all the time.
          batch: trees of data in memory while it runs.
          cache: trees of keys and values in memory while it runs.
          times, trips, useful: see `Program` and `count_costs`.
          made: the kind that its results count as: "other", "batch" or "cache".
        """
        self.log(f"compiling {name} …")
        began = time.perf_counter()
        try:
            compiled = lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _refused(name, str(error)) from error
        seconds = time.perf_counter() - began
        account = compiled.memory_analysis()
        nodes = nodes_of(list(self.mesh.devices.flat))
        costs = count_costs(compiled.as_text(), nodes, trips)
        made_bytes = max(0, account.output_size_in_bytes - account.alias_size_in_bytes)
        sizes = {"batch": device_bytes(batch), "cache": device_bytes(cache), "other": 0}
        # Arguments that a program does not read are dropped from it, but still take memory.
        sizes["other"] += max(
            0,
            account.argument_size_in_bytes - sizes["batch"] - sizes["cache"] - device_bytes(known),
        )
        sizes[made] += made_bytes
        self.done.append(
            Program(
                name=name,
                times=times,
                temporary=account.temp_size_in_bytes,
                costs=costs,
                useful=useful,
                seconds=seconds,
                **sizes,
            )
        )
        self.log(f"compiled {name} in {seconds:.0f} s")
        return compiled


def _refused(name: str, text: str) -> DoesNotFit:
    found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", text)
    if found is None:
        return DoesNotFit(f"{name} does not fit the device: {first_line(ValueError(text))}", None)
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    used, there = float(found[1]) * unit[found[2]], float(found[3]) * unit[found[4]]
    return DoesNotFit(
        f"{name} does not fit the device: it wants {used / 2**30:.2f} GiB of {there / 2**30:.2f} "
        f"GiB, {(used - there) / 2**30:.2f} GiB too much",
        used / there,
    )


def chunks(model: Any, rows: int, length: int, mesh: Mesh) -> tuple[int, int]:
    """How the vocabulary head splits its positions into chunks when all of them are trained.

    Returns:
      (positions per chunk, number of chunks).
    """
    cuts = axis_shards("length", mesh)
    parts = row_shards(mesh) * cuts
    lines = (rows * cuts, math.ceil(length / cuts)) if parts > 1 else (1, rows * length)
    with use_mesh(mesh):  # it depends on the mesh's device and the shards of the vocabulary
        chunk, count = head_chunks(*lines, model.config.vocab_size, parts)
    return chunk * lines[0], count


def compile_updates(
    compiler: Compiler, config: Any, state: TrainState, parts: Parts, batch: Any
) -> None:
    """Compiles a step in which every batch of data is one update: `prepare`, then the update.

    Args:
      compiler: records the programs.
      config: the run's config.
      state: its train state, as shapes.
      parts: its parts.
      batch: of data, as shapes.
    """
    rows, length, mesh = config.data.rows, config.data.length, compiler.mesh
    one_row = full_batch(batch, 1)
    sequences = round(parts.update_work(one_row).tokens * rows / length)
    batch = on_rows(batch, mesh)
    if parts.prepare is not None:
        prepare = parts.prepare
        lower = prepare.lower
        if lower is not None:
            name = "prepare" if parts.reference is None else "reference"
            compiler(
                name,
                lambda: lower(state, batch),
                known=(state.params, state.frozen, parts.frozen_params),
                batch=batch,
                trips=_trips(parts, sequences, length, mesh),
                useful=rows * parts.prepare_flops(one_row),
            )
        batch = on_rows(prepare.shapes(batch), mesh)
    compiler(
        "update",
        lambda: parts.step.lower(state, batch),
        known=state,
        batch=batch,
        trips=_trips(parts, sequences // config.run.micro_batches, length, mesh),
        useful=rows * parts.update_flops(one_row),
    )


def _trips(parts: Parts, sequences: int, length: int, mesh: Mesh) -> int:
    return chunks(parts.policy, sequences, length, mesh)[1] if parts.has_head else 1
