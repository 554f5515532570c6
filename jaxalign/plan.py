"""Will it fit? Compiles a run's real train step for named devices, without weights or data.

Everything is abstract: the model is read from `config.json` (or a GGUF file's metadata) alone, and
parameters, optimizer state and batch are shapes with the layout that a run would give them. The
devices may be absent: for TPUs a compiler is enough (`pip install "jaxalign[plan-tpu]"`).

Planned is the update: the step of SFT, reward modelling and DPO, and in PPO the update on one
mini-batch. Not planned are set-up, DPO's and PPO's `prepare` (reference log-probabilities;
sampling, whose key-value cache can be large), evaluation and export.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.abstract import PARTS, array
from jaxalign.algorithms.step import opt_state_shardings
from jaxalign.sharding import compile_step, make_mesh, replicated, row_shards
from jaxalign.types import TrainState

_TPU = re.compile(r"v\d+\w*:\d+(x\d+){1,2}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one device needs while the step runs, in bytes.

    Attributes:
      algorithm: "sft", "reward", "dpo", "kto" or "ppo".
      devices: how many of which kind.
      mesh: sizes of the mesh axes.
      params: trained parameters.
      frozen: the base under adapters, else 0.
      optimizer: optimizer state.
      batch: one batch (mini-batch, in PPO).
      models: models beside the step, held for `prepare`: DPO's reference where it is not the base
        under adapters, PPO's reference and reward model.
      temporary: gradients, activations, whatever the compiler keeps for the length of a step.
      other: padding of the arguments to the device's tiles, the step counter, metrics.
      total: all of it. The program's share is the compiler's own account (arguments, temporaries
        and outputs that replace no argument).
      compile_seconds: tracing and compiling.
    """

    algorithm: str
    devices: str
    mesh: dict[str, int]
    params: int
    frozen: int
    optimizer: int
    batch: int
    models: int
    temporary: int
    other: int
    total: int
    compile_seconds: float

    def __str__(self) -> str:
        kinds = ("params", "frozen", "optimizer", "batch", "models", "temporary", "other", "total")
        what = "update step" if self.algorithm == "ppo" else "step"
        mesh = " × ".join(f"{name}={size}" for name, size in self.mesh.items())
        return "\n".join(
            [
                f"{self.algorithm} {what} on {self.devices}, mesh {mesh}; on each device:",
                *(f"  {kind:<10} {_human(getattr(self, kind)):>12}" for kind in kinds),
                f"compiled in {self.compile_seconds:.1f} s",
            ]
        )


def make_plan(algorithm: str, config: Any, devices: str | None = None) -> Plan:
    """Compiles the step of a run and reads the compiler's account of its memory.

    Args:
      algorithm: "sft", "reward", "dpo", "kto" or "ppo".
      config: from `load_config(algorithm, …)`.
      devices: "cpu:8"; a TPU topology such as "v5e:2x4", "v5p:2x2x2", "v6e:4x4"; None: those that
        are present.

    Raises:
      ValueError: no such devices or no compiler for them, no such model, sizes that do not divide,
        or a step that the compiler cannot fit into the device.
    """
    if algorithm not in PARTS:
        raise ValueError(f"algorithm={algorithm!r}: wanted one of {', '.join(PARTS)}")
    mesh = make_mesh(
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=find_devices(devices)
    )
    _check_rows(config, mesh)
    params, frozen, tx, step, batch, models = PARTS[algorithm](config, mesh)
    opt_state = jax.tree.map(
        lambda x, sharding: array(x.shape, x.dtype, sharding),
        jax.eval_shape(tx.init, params),
        opt_state_shardings(params, tx),
    )
    counter = array((), jnp.int32, replicated(mesh))
    state = TrainState(counter, params, frozen, opt_state)

    began = time.perf_counter()
    try:
        compiled = compile_step(step, state, mesh).lower(state, batch).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(
            f"the step does not fit the device: {_first_line(error)}; use more devices, larger "
            "run.micro_batches, model.remat=block, fewer data.rows, shorter data.length, or LoRA"
        ) from error
    seconds = time.perf_counter() - began

    shards = row_shards(mesh)
    sizes = {
        "params": _bytes(params),
        "frozen": _bytes(frozen),
        "optimizer": _bytes(opt_state),
        "batch": sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(batch))
        // shards,
    }
    account = compiled.memory_analysis()
    # Arguments that the step does not read are left out of the program, but lie in memory too.
    padding = max(0, account.argument_size_in_bytes - sum(sizes.values()))
    sizes |= {
        "models": sum(_bytes(tree) for tree in models),
        "temporary": account.temp_size_in_bytes,
        "other": padding + account.output_size_in_bytes - account.alias_size_in_bytes,
    }
    return Plan(
        algorithm=algorithm,
        devices=f"{mesh.size} × {mesh.devices.flat[0].device_kind}",
        mesh=dict(mesh.shape),
        total=sum(sizes.values()),
        compile_seconds=seconds,
        **sizes,
    )


def find_devices(name: str | None = None) -> list[jax.Device]:
    """Devices by name: "cpu:8", a TPU topology such as "v5e:2x4", or None for those present.

    Raises:
      ValueError: the name is neither, there are fewer CPU devices, no TPU compiler is installed,
        or it does not know the topology.
    """
    if name is None:
        return jax.devices()
    kind, _, count = name.partition(":")
    if kind == "cpu" and count.isdecimal() and int(count):
        there = jax.devices("cpu")
        if len(there) < int(count):
            raise ValueError(
                f"devices {name!r}: there are {len(there)} CPU devices; start with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return there[: int(count)]
    if not _TPU.fullmatch(name):
        raise ValueError(
            f"devices {name!r}: wanted cpu:N, or a TPU topology such as v5e:2x4, v5p:2x2x2, v6e:4x4"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"devices {name!r}: the TPU compiler is not installed; "
            'pip install "jaxalign[plan-tpu]" (no TPU is needed)'
        )
    from jax.experimental import topologies

    # Off a TPU machine the compiler would wait long for a metadata server that is not there.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # the plugin's errors vary with its version
        raise ValueError(
            f"devices {name!r}: the TPU compiler knows no such topology ({_first_line(error)}); "
            "try one such as v5e:2x4, v5p:2x2x2, v6e:4x4"
        ) from error


def _check_rows(config: Any, mesh: Mesh) -> None:
    unit = row_shards(mesh) * config.run.micro_batches * getattr(config, "minibatches", 1)
    if config.data.rows % unit:
        raise ValueError(
            f"data.rows={config.data.rows} does not divide over data × fsdp, micro-batches and "
            f"mini-batches on these devices; use a multiple of {unit} rows"
        )


def _bytes(tree: Any) -> int:
    """Bytes of a tree on one device, by its layout."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _human(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
