"""Peak FLOP/s, memory and bandwidths of TPUs and GPUs, from the manufacturers' data sheets.

TPUs: https://cloud.google.com/tpu/docs (system architecture of v4, v5e, v5p, v6e). The inter-chip
bandwidth is the sum over a chip's links in one direction, half of the "bidirectional" figure. GPUs:
NVIDIA's data sheets for A100, H100 and H200 (SXM). NVLink bandwidth is counted in one direction.
Between nodes each GPU has one InfiniBand port, HDR for A100 and NDR for H100 and H200, as in DGX
systems.
"""

from __future__ import annotations

import dataclasses

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one JAX device.

    Attributes:
      flops: peak of dense bfloat16 matrix products, FLOP/s.
      memory: bytes available to a program: the compiler's limit on TPUs; on GPUs 0.94 of the
        memory, the rest being taken by the CUDA context and libraries.
      bandwidth: memory bandwidth, bytes/s.
      inner: send bandwidth within a TPU slice (ICI) or a GPU node (NVLink), bytes/s.
      outer: send bandwidth between slices or nodes, over the data-centre network, bytes/s.
    """

    flops: float
    memory: int
    bandwidth: float
    inner: float
    outer: float


CHIPS: dict[str, Chip] = {
    "v4": Chip(flops=275e12, memory=int(31.75 * GIB), bandwidth=1.2e12, inner=300e9, outer=6.25e9),
    "v5e": Chip(flops=197e12, memory=int(15.75 * GIB), bandwidth=819e9, inner=200e9, outer=3.125e9),
    "v5p": Chip(flops=459e12, memory=int(95.74 * GIB), bandwidth=2765e9, inner=600e9, outer=6.25e9),
    "v6e": Chip(flops=918e12, memory=int(31.25 * GIB), bandwidth=1.6e12, inner=400e9, outer=12.5e9),
    "a100-40g": Chip(
        flops=312e12, memory=int(0.94 * 42.4e9), bandwidth=1.555e12, inner=300e9, outer=25e9
    ),
    "a100-80g": Chip(
        flops=312e12, memory=int(0.94 * 85.1e9), bandwidth=2.039e12, inner=300e9, outer=25e9
    ),
    "h100": Chip(
        flops=989.4e12, memory=int(0.94 * 84.9e9), bandwidth=3.352e12, inner=450e9, outer=50e9
    ),
    "h200": Chip(
        flops=989.4e12, memory=int(0.94 * 150.8e9), bandwidth=4.8e12, inner=450e9, outer=50e9
    ),
}
"""Name in a topology → figures. CPUs are not listed: their speed and memory vary."""

KINDS: dict[str, str] = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "NVIDIA A100-SXM4-40GB": "a100-40g",
    "NVIDIA A100-SXM4-80GB": "a100-80g",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""JAX's `device_kind` → name in `CHIPS`."""


def peak_flops() -> float | None:
    """Total peak FLOP/s of all present devices; None if their kind is not in the table."""
    devices = jax.devices()
    chip = chip_of(devices[0].device_kind)
    return None if chip is None else chip.flops * len(devices)


def chip_of(device_kind: str) -> Chip | None:
    """Figures of a device kind; None for CPUs and for kinds that are not in the table."""
    return CHIPS[KINDS[device_kind]] if device_kind in KINDS else None
