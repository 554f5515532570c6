"""Which kind of attention runs: one table of what each kernel lacks, and the choice.

This is about whole rows, in training, scoring and prefill. Decoding attends to its cache in its own
way (`jaxalign.models.attention.kv_cache`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.parallel.jax_private import has_cuda
from jaxalign.parallel.shard_map import current_device

KINDS = ("auto", "xla", "splash", "cudnn")
"""What a model may ask for: by platform; plain XLA; splash attention; cuDNN's flash attention."""


class AttentionKind(NamedTuple):
    """Which kind of attention runs, and why.

    Attributes:
      kind: "xla", "splash" or "cudnn".
      why: a few words for a person.
    """

    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What the choice depends on.

    Attributes:
      dtype: of queries, keys and values.
      head_dim: width of a head.
      length: tokens of a row.
      softcap: whether scores are capped.
      branches: whether rows have branches.
      no_mesh: whether there are several devices and no mesh in context.
      platform: "cpu", "gpu" or "tpu".
      device_kind: the device's name, e.g. "NVIDIA H100 80GB HBM3".
    """

    dtype: str
    head_dim: int
    length: int
    softcap: bool = False
    branches: bool = False
    no_mesh: bool = False
    platform: str = "cpu"
    device_kind: str = ""


UNSUPPORTED: dict[str, tuple[tuple[Callable[[Case], bool], str], ...]] = {
    "splash": (
        (lambda case: case.branches, "it knows no branches"),
        (lambda case: case.dtype == "float16", "TPUs have no float16"),
        (lambda case: case.length < 128, "its least block is 128 tokens"),
        (lambda case: case.no_mesh, "no mesh in context splits it over the devices"),
    ),
    "cudnn": (
        (
            lambda case: case.platform != "gpu" or not case.device_kind.startswith("NVIDIA"),
            "it needs an NVIDIA GPU",
        ),
        (lambda case: case.softcap, "it has no soft cap"),
        (lambda case: case.dtype == "float32", "it computes in bfloat16 or float16 only"),
        (lambda case: case.head_dim % 8 != 0, "it wants heads of a multiple of 8 dimensions"),
        (lambda case: case.head_dim > _widest_head(), "its heads are at most 128 or 256 wide"),
        (lambda case: not _has_cudnn(), "cuDNN, or a GPU from Ampere on, is missing"),
    ),
}
"""Kernel → what it does not cover, in words. It covers all else; plain XLA covers everything."""

BY_PLATFORM = {"tpu": "splash", "gpu": "cudnn"}
"""What "auto" stands for; "xla" elsewhere."""


def attention_kind(
    requested: str = "auto", *, dtype: str, head_dim: int, length: int,
    softcap: float | None = None, branches: bool = False, device: tuple[str, str] | None = None,
) -> AttentionKind:  # fmt: skip
    """Chooses the kind of attention.

    Args:
      requested: one of `KINDS`. A kernel that does not cover the case gives way to plain
        XLA, requested or not. "splash" off TPUs runs in Pallas' interpreter.
      dtype: of activations.
      head_dim: width of a head.
      length: tokens of a row.
      softcap: of the scores, or None.
      branches: whether rows have branches.
      device: platform and kind; None: `current_device()`.

    Raises:
      ValueError: `requested` is not one of `KINDS`.
    """
    check_kind(requested)
    platform, device_kind = current_device() if device is None else device
    kind = BY_PLATFORM.get(platform, "xla") if requested == "auto" else requested
    if kind == "xla":
        why = "asked for" if requested == "xla" else f"{platform} has no kernel here"
        return AttentionKind("xla", why)
    case = Case(
        dtype=jnp.dtype(dtype).name,
        head_dim=head_dim,
        length=length,
        softcap=softcap is not None,
        branches=branches,
        no_mesh=jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1,
        platform=platform,
        device_kind=device_kind,
    )
    for applies, why in UNSUPPORTED[kind]:
        if applies(case):
            return AttentionKind("xla", f"not {kind}: {why}")
    why = "asked for" if requested != "auto" else f"the kernel for {platform}"
    return AttentionKind(kind, why)


def check_kind(requested: str) -> None:
    """Refuses an unknown kind of attention.

    Raises:
      ValueError: it is not one of `KINDS`.
    """
    if requested not in KINDS:
        raise ValueError(f"attention={requested!r}: wanted one of {', '.join(KINDS)}")


def _capability() -> float | None:
    """Compute capability of the GPU that is present; None where the program is for another one."""
    devices = jax.local_devices()
    present = getattr(devices[0], "compute_capability", None)
    return None if present is None else float(present)


def _widest_head() -> int:
    capability = _capability()
    return 256 if capability is None or capability >= 9 else 128


def _has_cudnn() -> bool:
    capability = _capability()
    if capability is not None and capability < 8:
        return False
    return has_cuda()
