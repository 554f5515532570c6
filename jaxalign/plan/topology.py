"""Devices by name, present or absent: `v5p-128`, `v5e:4x4`, `h100:8x16`, `a100-80g:4`, `cpu:8`."""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import math
import os
import re
from typing import Any, NamedTuple

import jax

from jaxalign.parallel.chips import CHIPS
from jaxalign.plan.installed import installed, unmet

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_CUBES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8))

TPU_SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "v4": (*_CUBES, (8, 8, 12), (8, 8, 16), (8, 16, 16)),
    "v5e": _FLAT,
    "v5p": (*_CUBES, (8, 8, 16), (8, 16, 16), (16, 16, 16), (16, 16, 24)),
    "v6e": _FLAT,
}
"""Available slices, smallest first (https://cloud.google.com/tpu/docs)."""

CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
"""Units per chip of the number in a name: v4 and v5p count TensorCores, two per chip."""

GPUS_A_NODE = 8

_EXAMPLES = "v5e-16, v5p-128, v6e-256, h100:8, h100:8x16, a100-80g:4, cpu:8"


class _Gpu(NamedTuple):
    """A GPU's description for the compiler, from the CUDA programming guide and data sheets."""

    name: str
    capability: tuple[int, int]
    cores: int
    units: int
    shared: int
    block: int
    cache: int
    memory: int
    bandwidth: int
    clock: float


_GPUS = {
    "a100-40g": _Gpu(
        "NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 164, 163, 40, 42_400_000_000, 1_555, 1.41
    ),
    "a100-80g": _Gpu(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 163, 40, 85_100_000_000, 2_039, 1.41
    ),
    "h100": _Gpu(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 227, 50, 84_942_000_000, 3_352, 1.98
    ),
    "h200": _Gpu("NVIDIA H200", (9, 0), 132, 128, 228, 227, 50, 150_754_000_000, 4_800, 1.98),
}


class Named(NamedTuple):
    """A topology that has been found in the tables.

    Attributes:
      family: key of `CHIPS`, or "cpu".
      shape: the shape of one TPU slice; for GPUs (nodes, GPUs per node); for CPUs their number.
      slices: the number of TPU slices.
    """

    family: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def devices(self) -> int:
        """How many there are."""
        return math.prod(self.shape) * self.slices


def parse_topology(name: str) -> Named:
    """Parses the name of a topology.

    `v5p-128` counts as Google does (v4 and v5p: TensorCores, v5e and v6e: chips), `x2` after it
    means two slices; `v5e:4x4` gives the shape; `h100:8` is 8 GPUs in one node, `h100:8x16` 8 in
    each of 16 nodes; `cpu:8` is 8 fake CPU devices.

    Raises:
      ValueError: no such topology; the message names the nearest.
    """
    family, separator, size = _split(name)
    if family in TPU_SHAPES and separator == "-":
        return _slice(name, family, size)
    if family in TPU_SHAPES and re.fullmatch(r"\d+(x\d+){1,2}", size):
        shape = tuple(int(part) for part in size.split("x"))
        if len(shape) == len(TPU_SHAPES[family][0]) and all(shape):
            return Named(family, shape)
        there = ", ".join("x".join(map(str, s)) for s in TPU_SHAPES[family])
        raise ValueError(f"topology {name!r}: slices of {family} are shaped {there}")
    if family in _GPUS and re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", size):
        a_node, _, nodes = size.partition("x")
        if int(a_node) <= GPUS_A_NODE:
            return Named(family, (int(nodes or 1), int(a_node)))
        near = f"{family}:8x{max(2, round(int(a_node) / GPUS_A_NODE))}"
        raise ValueError(
            f"topology {name!r}: a node has {GPUS_A_NODE} GPUs; the nearest is {near} "
            "(GPUs a node × nodes)"
        )
    if family == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return Named("cpu", (int(size),))
    known = [*CHIPS, "cpu"]
    near = difflib.get_close_matches(family, known, 1, 0.3)
    hint = f"the nearest kind is {near[0]}; " if near and near[0] != family else ""
    raise ValueError(f"topology {name!r}: no such devices; {hint}wanted one such as {_EXAMPLES}")


def _split(name: str) -> tuple[str, str, str]:
    if ":" in name:
        return name.partition(":")
    return name.partition("-")


def _slice(name: str, family: str, size: str) -> Named:
    match = re.fullmatch(r"(\d+)(?:x([1-9]\d*))?", size)
    counts = {math.prod(shape) * CORES[family]: shape for shape in TPU_SHAPES[family]}
    if match is None or int(match[1]) not in counts:
        wanted = int(match[1]) if match else 1
        near = sorted(counts, key=lambda count: abs(math.log(count / max(1, wanted))))[:2]
        unit = "TensorCores" if CORES[family] > 1 else "chips"
        raise ValueError(
            f"topology {name!r}: no such slice of {family} (named by {unit}); the nearest are "
            + " and ".join(f"{family}-{count}" for count in sorted(near))
        )
    return Named(family, counts[int(match[1])], int(match[2] or 1))


def next_that_holds(named: Named, devices: float) -> str | None:
    """The smallest topology of the same kind with at least this many devices, or None."""
    if named.family in TPU_SHAPES:
        for shape in TPU_SHAPES[named.family]:
            if math.prod(shape) >= devices:
                return f"{named.family}-{math.prod(shape) * CORES[named.family]}"
        return None
    if named.family == "cpu":
        return f"cpu:{math.ceil(devices)}"
    if devices <= GPUS_A_NODE:
        return f"{named.family}:{2 ** math.ceil(math.log2(max(1, devices)))}"
    return f"{named.family}:{GPUS_A_NODE}x{2 ** math.ceil(math.log2(devices / GPUS_A_NODE))}"


def find_devices(name: str | None = None) -> list[jax.Device]:
    """Devices by name; see `parse_topology`. None: the present devices.

    Raises:
      ValueError: no such topology, fewer CPU devices than named, or no compiler for the devices.
    """
    if name is None:
        return jax.devices()
    named = parse_topology(name)
    if named.family == "cpu":
        there = jax.devices("cpu")
        if len(there) < named.devices:
            raise ValueError(
                f"topology {name!r}: there are {len(there)} CPU devices; start with "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={named.devices}"
            )
        return there[: named.devices]
    return _tpus(name, named) if named.family in TPU_SHAPES else _gpus(name, named)


def _tpus(name: str, named: Named) -> list[jax.Device]:
    _need("libtpu", name, "TPU", "plan-tpu")
    _check_version("libtpu", name, "tpu")
    # Off a TPU machine the compiler would wait long for a missing metadata server.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Nothing runs on a TPU here, so two plans may be made at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if named.family == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip, as on real machines
    if math.prod(named.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if named.slices > 1:
        options["num_slices"] = named.slices
    shape = "x".join(map(str, named.shape))
    return _described(name, "tpu", f"{named.family}:{shape}", options)


def _gpus(name: str, named: Named) -> list[jax.Device]:
    plugins = {"jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13"}
    there = [plugin for plugin in plugins if importlib.util.find_spec(plugin)]
    if not there:
        _need("jax_cuda12_plugin", name, "GPU", "plan-gpu")
    for plugin in there:
        _check_version(plugin.replace("_", "-"), name, plugins[plugin])
    # The compiler needs no driver, and not all of the toolkit for running programs.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    nodes, a_node = named.shape
    options = {"topology": f"{nodes}x1x{a_node}", "target_config": _target(_GPUS[named.family])}
    return _described(name, "cuda", named.family, options)


def _need(module: str, name: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise ValueError(
            f"topology {name!r}: the {what} compiler is not installed; "
            f'pip install "jaxalign[{extra}]" (no {what} is needed)'
        )


def _check_version(package: str, name: str, extra: str) -> None:
    """Raises ValueError for a compiler version other than JAX's extra requires.

    A newer one may crash in an internal check that does not reveal the cause.
    """
    wanted = unmet(package, "jax", extra)
    if wanted is not None:
        raise ValueError(
            f"topology {name!r}: {package} {installed(package)} is installed, JAX "
            f'{jax.__version__} wants {package} {wanted.specifier}; pip install "{wanted}"'
        )


def _described(name: str, platform: str, full: str, options: dict[str, Any]) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(full, platform, **options).devices
    except Exception as error:  # the plugins' errors vary with their version
        raise ValueError(
            f"topology {name!r}: the compiler knows no such devices ({first_line(error)}); "
            f"wanted one such as {_EXAMPLES}"
        ) from error


def _target(gpu: _Gpu) -> str:
    """XLA's description of a GPU, as a text proto."""
    accelerated = "feature_extension: ACCELERATED_FEATURES" if gpu.capability[0] >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared * 1024}
  shared_memory_per_block_optin: {gpu.block * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: {gpu.cores}
  fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  memory_bandwidth: {gpu.bandwidth}000000000
  l2_cache_size: {gpu.cache * 1024 * 1024}
  clock_rate_ghz: {gpu.clock}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} {accelerated} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def nodes_of(devices: list[jax.Device]) -> list[int]:
    """Which slice (TPU) or node (GPU) each device is in: what fast links join."""
    if devices[0].platform == "tpu":
        return [getattr(device, "slice_index", None) or 0 for device in devices]
    return [device.process_index for device in devices]


def nearest_mesh(data: int, fsdp: int, tensor: int, devices: int) -> str:
    """The mesh for so many devices that is nearest to the sizes wanted (-1: any)."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]

    def far(mesh: tuple[int, int, int]) -> float:
        pairs = zip(mesh, (data, fsdp, tensor), strict=True)
        return sum(abs(math.log(size / want)) for size, want in pairs if want > 0)

    meshes = [(d, devices // (d * t), t) for d, t in itertools.product(sizes, sizes)]
    best = min((m for m in meshes if math.prod(m) == devices), key=far)
    return f"data={best[0]} × fsdp={best[1]} × tensor={best[2]}"


def first_line(error: Exception) -> str:
    """What an error says, without its trace."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
