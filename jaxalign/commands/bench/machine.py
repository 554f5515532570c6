"""The machine's limits, peak memory, and counts of compiled programs."""

from __future__ import annotations

import contextlib
import importlib.metadata
import pathlib
import platform
import resource
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jaxalign.commands.startup.freed_memory import COMPILED
from jaxalign.parallel.chips import chip_of, peak_flops
from jaxalign.parallel.sharding import replicated, rows_sharding


class Limit(NamedTuple):
    """The upper bound of the speed.

    Attributes:
      flops: FLOP/s of all devices.
      source: the origin of the number.
      bandwidth: bytes/s of one device's memory; None if unknown.
    """

    flops: float
    source: str
    bandwidth: float | None = None


def limit(mesh: Mesh, dtype: str) -> Limit:
    """The data sheet's peak for bfloat16 products; for other devices the best measured rate."""
    peak = peak_flops()
    if peak is not None:
        chip = chip_of(jax.devices()[0].device_kind)
        return Limit(peak, "maker's peak, bfloat16", None if chip is None else chip.bandwidth)
    return Limit(matmul_rate(mesh, dtype), f"best {dtype} matrix product of this run")


def matmul_rate(mesh: Mesh, dtype: str, sizes: tuple[int, ...] = (1024, 2048), tries: int = 6):
    """FLOP/s of the fastest of several square matrix products, rows split over the mesh."""
    best = 0.0
    product = jax.jit(lambda a, b: a @ b, out_shardings=rows_sharding(mesh))
    for size in sizes:
        draw = jax.random.normal(jax.random.key(size), (size, size), dtype)
        left = jax.device_put(draw, rows_sharding(mesh))
        right = jax.device_put(draw, replicated(mesh))
        jax.block_until_ready(product(left, right))
        for _ in range(tries):
            start = time.perf_counter()
            jax.block_until_ready(product(left, right))
            best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return best


def reset_peak() -> None:
    """Resets the process's peak memory, if the system supports it (Linux)."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, Any]:
    """Peak bytes: on a device since the start; on a CPU of the process since `reset_peak`."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"peak_bytes": int(stats["peak_bytes_in_use"]), "peak_of": "device"}
    status = pathlib.Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return {"peak_bytes": int(line.split()[1]) * 1024, "peak_of": "process"}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scale = 1 if platform.system() == "Darwin" else 1024
    return {"peak_bytes": peak * scale, "peak_of": "process"}


class Compiled:
    """Counts compiled programs and their compile time in seconds."""

    def __init__(self) -> None:
        self.programs, self.seconds = 0, 0.0

    def __call__(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Collects the durations that JAX records."""
        if event == COMPILED:
            self.programs, self.seconds = self.programs + 1, self.seconds + duration_secs


@contextlib.contextmanager
def counting() -> Iterator[Compiled]:
    """Counts the programs compiled within the block."""
    seen = Compiled()
    jax.monitoring.register_event_duration_secs_listener(seen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(seen)


def versions() -> dict[str, str]:
    """Versions of the packages that affect speed."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    return {"python": platform.python_version()} | found
