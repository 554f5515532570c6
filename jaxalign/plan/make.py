"""Makes a plan from a configuration and devices."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.models.base import combine
from jaxalign.parallel.chips import GIB, Chip, chip_of
from jaxalign.plan.costs import Costs
from jaxalign.plan.decode import DecodeStep, decode_steps
from jaxalign.plan.loader import HostArray, ShapeLoader
from jaxalign.plan.programs import (
    Compiler,
    DoesNotFit,
    Log,
    Program,
    chunks,
    compile_updates,
    device_bytes,
    on_rows,
)
from jaxalign.plan.result import Plan
from jaxalign.plan.rollout import (
    answer_shapes,
    compile_iteration,
    lower_experience,
    rollout_shapes,
    update_shapes,
)
from jaxalign.plan.roofline import estimate
from jaxalign.plan.storage import BANDWIDTH, estimate_checkpoint
from jaxalign.plan.topology import find_devices, nearest_mesh, next_that_holds, parse_topology
from jaxalign.run.config.base import Run
from jaxalign.run.tasks import ALGORITHMS
from jaxalign.run.tasks.parts import Parts, unread_data
from jaxalign.run.tasks.ppo import RolloutParts
from jaxalign.run.tasks.rows import check_rows
from jaxalign.run.tasks.shapes import full_batch
from jaxalign.types import TrainState


def run_shapes(algorithm: str, config: Run, mesh: Mesh) -> tuple[TrainState, Parts]:
    """The train state and the parts of a run, as shapes; compiles nothing.

    Raises:
      ValueError: no such algorithm or model, or sizes that do not divide.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm={algorithm!r}: wanted one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm].build(config, mesh, ShapeLoader(), unread_data(config))


def step_shapes(algorithm: str, config: Run, mesh: Mesh, state: TrainState, parts: Parts) -> Any:
    """The batch that the step takes, as shapes; `state` and `parts` from `run_shapes`."""
    if isinstance(parts, RolloutParts):
        tokens = answer_shapes(config, parts, mesh)
        experience = lower_experience(config, state, parts, tokens, mesh)
        return on_rows(update_shapes(config, parts, rollout_shapes(config, experience)), mesh)
    batch = on_rows(ALGORITHMS[algorithm].shapes(config), mesh)
    return batch if parts.prepare is None else on_rows(parts.prepare.shapes(batch), mesh)


def make_plan(
    algorithm: str,
    config: Run,
    topology: str | None = None,
    log: Log = lambda text: None,
    *,
    storage: float = BANDWIDTH,
) -> Plan:
    """Compiles the programs of a run and reads the compiler's memory analysis.

    Args:
      algorithm: key of `jaxalign.run.tasks.ALGORITHMS`.
      config: from `load_config(algorithm, …)`.
      topology: see `parse_topology`; None: the present devices.
      log: called with a line about the progress.
      storage: bandwidth of a host to the storage of checkpoints, bytes/s.

    Raises:
      ValueError: no such devices or no compiler for them, no such model, sizes that do not divide,
        or a program that cannot fit into the devices; the message suggests the nearest that fits.
    """
    if config.mesh.apart:
        raise ValueError(
            f"mesh.apart={config.mesh.apart}: a plan is of devices that all do the same; plan the "
            "rest with as many devices fewer and without it"
        )
    with config.mesh.use_rules():
        return _make_plan(algorithm, config, topology, log, storage)


def _make_plan(algorithm: str, config: Run, topology: str | None, log: Log, storage: float) -> Plan:
    mesh = _mesh(config, topology)
    check_rows(config, mesh)
    state, parts = run_shapes(algorithm, config, mesh)
    checkpoint = estimate_checkpoint(state, mesh, storage)
    sizes = resident_bytes(state, parts)
    chip = chip_of(mesh.devices.flat[0].device_kind)
    capacity = None if chip is None else chip.memory
    _check_resident(sizes, capacity, mesh, topology)
    try:
        programs = compile_programs(algorithm, config, mesh, state, parts, log)
    except DoesNotFit as error:
        raise ValueError(f"{error}; {_remedy(error.over, mesh, topology)}") from error

    peak = max(programs, key=lambda program: program.extra)
    for name in ("batch", "cache", "temporary", "other"):
        sizes[name] = getattr(peak, name)
    total = sum(sizes.values())
    tokens = _tokens(algorithm, config, parts)
    frozen = frozen_models(state, parts)
    return Plan(
        algorithm=algorithm,
        topology=topology,
        devices=f"{mesh.size} × {mesh.devices.flat[0].device_kind}",
        mesh=dict(mesh.shape),
        total=total,
        host=device_bytes((state, frozen), host=True),
        capacity=capacity,
        fits=None if capacity is None else total <= capacity,
        peak=peak.name,
        compile_seconds=sum(program.seconds for program in programs),
        tokens=tokens,
        costs=sum((program.costs * program.times for program in programs), Costs()),
        speed=None if chip is None else estimate(programs, chip, mesh.size, tokens),
        head_chunk=_head_chunk(config, mesh, parts),
        decode=() if chip is None else _decode(config, state, parts, chip, mesh.size),
        checkpoint=checkpoint,
        programs=tuple(programs),
        notes=(*parts.notes, *_unknown_host_memory(state, frozen)),
        **sizes,
    )


def _decode(
    config: Run, state: TrainState, parts: Parts, chip: Chip, devices: int
) -> tuple[DecodeStep, ...]:
    """The roofline of the policy's decoding, for answers half as long as the maximum."""
    if not isinstance(parts, RolloutParts):
        return ()
    model, options = parts.policy, parts.options
    return decode_steps(
        model.config,
        combine(state.params, state.frozen)["policy"],
        chip,
        devices,
        context=config.data.length + options.max_new_tokens / 2,
        dtype=model.compute_dtype,
        cache_dtype=options.cache_dtype or model.compute_dtype,
    )


def compile_programs(
    algorithm: str, config: Run, mesh: Mesh, state: TrainState, parts: Parts, log: Log
) -> list[Program]:
    """Compiles every program of one step of a run, or of one PPO iteration."""
    compiler = Compiler(mesh, log)
    if isinstance(parts, RolloutParts):
        compile_iteration(compiler, config, state, parts, log)
    else:
        batch = ALGORITHMS[algorithm].shapes(config)
        compile_updates(compiler, config, state, parts, batch)
    return compiler.done


def _tokens(algorithm: str, config: Run, parts: Parts) -> int:
    """Tokens that the updates train on, including prompts, if every row is full."""
    if isinstance(parts, RolloutParts):
        return config.sequences * (config.data.length + parts.options.max_new_tokens)
    one_row = full_batch(ALGORITHMS[algorithm].shapes(config), 1)
    return config.data.rows * round(parts.update_work(one_row).tokens)


def _head_chunk(config: Run, mesh: Mesh, parts: Parts) -> int | None:
    if not parts.has_head:
        return None
    length = config.data.length
    if isinstance(parts, RolloutParts):
        length += parts.options.max_new_tokens - 1
    rows = config.sequences // math.prod(config.row_parts.values())
    return chunks(parts.policy, max(1, rows), length, mesh)[0]


def _unknown_host_memory(*trees: Any) -> list[str]:
    """A note if the compiler does not support host memory."""
    away = [x for x in jax.tree.leaves(trees) if isinstance(x, HostArray)]
    if not away or away[0].sharding.memory_kind is not None:
        return []
    return [
        "ahead of time this compiler knows no host memory: a program is taken to hold on the "
        "device all that it reads of what is offloaded"
    ]


def resident_bytes(state: TrainState, parts: Parts) -> dict[str, int]:
    """The bytes that stay on a device all the time, by kind."""
    return {
        "params": device_bytes(state.params),
        # Policy and critic may have adapters on the same base.
        "frozen": device_bytes(list({id(x): x for x in jax.tree.leaves(state.frozen)}.values())),
        "optimizer": device_bytes(state.opt_state),
        "models": device_bytes(frozen_models(state, parts)),
    }


def frozen_models(state: TrainState, parts: Parts) -> list[Any]:
    """Parameters outside the train state, each once: an adapter's base may also be a reference."""
    known = {id(x) for x in jax.tree.leaves(state)}
    leaves = {id(x): x for x in jax.tree.leaves(parts.frozen_params)}
    return [x for number, x in leaves.items() if number not in known]


def _mesh(config: Run, topology: str | None) -> Mesh:
    devices = find_devices(topology)
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    try:
        return config.mesh.make(devices)
    except ValueError as error:
        if any(size < -1 or not size for size in sizes):
            raise
        near = nearest_mesh(*sizes, len(devices))
        raise ValueError(f"{error}; the nearest mesh for {len(devices)} is {near}") from error


def _check_resident(
    sizes: dict[str, int], capacity: int | None, mesh: Mesh, topology: str | None
) -> None:
    """Raises an error, before compiling, for a run that cannot fit."""
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
