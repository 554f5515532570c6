"""Chooses the kind of attention, from one table of what each kernel lacks.

This covers whole rows, in training, scoring and prefill. Decoding has its own attention to the
cache (`jaxalign.models.attention.kv_cache`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.parallel.jax_private import has_cuda
from jaxalign.parallel.shard_map import current_device

KINDS = ("auto", "xla", "splash", "cudnn", "pallas")
"""What a model may ask for: by platform; plain XLA; splash attention; cuDNN's flash attention, with
the next for rows that it does not know; flash attention in Pallas for GPUs."""


class AttentionKind(NamedTuple):
    """Which kind of attention runs, and why.

    Attributes:
      kind: "xla", "splash", "cudnn" or "pallas".
      why: the reason, in a few words for the user.
    """

    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.why})"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """The facts that the choice depends on.

    Attributes:
      dtype: the dtype of queries, keys and values.
      head_dim: the width of a head.
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
    "pallas": (
        (lambda case: case.platform == "tpu", "it is for GPUs"),
        (
            lambda case: case.platform == "gpu" and not case.device_kind.startswith("NVIDIA"),
            "it needs an NVIDIA GPU",
        ),
        (
            lambda case: case.platform == "gpu" and case.dtype == "float32",
            "it computes in bfloat16 or float16 only",
        ),
        (lambda case: case.head_dim > 256, "its heads are at most 256 wide"),
        (lambda case: case.no_mesh, "no mesh in context splits it over the devices"),
        (lambda case: not _from_ampere(), "it needs a GPU from Ampere on"),
        (lambda case: not has_triton(), "this version of JAX has no Triton kernels"),
    ),
}
"""Kernel → what it does not cover, in words. It covers everything else; plain XLA covers all."""

BY_PLATFORM = {"tpu": ("splash",), "gpu": ("cudnn", "pallas")}
"""The candidates of "auto": the first that covers the case is used, else "xla"."""


def attention_kind(
    requested: str = "auto", *, dtype: str, head_dim: int, length: int,
    softcap: float | None = None, branches: bool = False, device: tuple[str, str] | None = None,
) -> AttentionKind:  # fmt: skip
    """Chooses the kind of attention.

    Args:
      requested: one of `KINDS`. If a kernel does not cover the case, plain XLA runs instead, even
        if the kernel was requested. "splash" off TPUs and "pallas" on CPUs run in Pallas'
        interpreter.
      dtype: dtype of activations.
      head_dim: the width of a head.
      length: tokens of a row.
      softcap: the soft cap of the scores, or None.
      branches: whether rows have branches.
      device: platform and kind; None: `current_device()`.

    Raises:
      ValueError: `requested` is not one of `KINDS`.
    """
    check_kind(requested)
    platform, device_kind = current_device() if device is None else device
    wanted = BY_PLATFORM.get(platform, ()) if requested == "auto" else (requested,)
    if wanted in ((), ("xla",)):
        why = "asked for" if requested == "xla" else f"{platform} has no kernel here"
        return AttentionKind("xla", why)
    case = Case(
        dtype=jnp.dtype(dtype).name,
        head_dim=head_dim,
        length=length,
        softcap=softcap is not None,
        branches=branches,
        no_mesh=no_mesh(),
        platform=platform,
        device_kind=device_kind,
    )
    reasons = []
    for kind in wanted:
        lacks = next((why for applies, why in UNSUPPORTED[kind] if applies(case)), None)
        if lacks is None:
            why = "asked for" if requested != "auto" else f"the kernel for {platform}"
            return AttentionKind(kind, "; ".join((*reasons, why)))
        reasons.append(f"not {kind}: {lacks}")
    return AttentionKind("xla", "; ".join(reasons))


@functools.lru_cache(maxsize=64)
def report_fallback(choice: AttentionKind) -> None:
    """Prints to stderr, once per process, that plain XLA replaced a kernel, and why."""
    if choice.kind == "xla" and choice.why.startswith("not ") and jax.process_index() == 0:
        print(f"attention: plain XLA runs; {choice.why}", file=sys.stderr, flush=True)


def takes_zigzag(kind: str) -> bool:
    """Whether a kind of attention takes rows in zigzag order (`parallel.zigzag`).

    Plain XLA computes every block of a device's queries against the same columns: nothing would be
    saved. It takes the place of the Pallas kernel where that is missing.
    """
    return kind == "splash" or (kind in ("cudnn", "pallas") and has_triton())


def no_mesh() -> bool:
    """Whether there are several devices and no mesh in context that splits work over them."""
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def check_kind(requested: str) -> None:
    """Raises ValueError for an unknown kind of attention.

    Raises:
      ValueError: it is not one of `KINDS`.
    """
    if requested not in KINDS:
        raise ValueError(f"attention={requested!r}: wanted one of {', '.join(KINDS)}")


@functools.cache
def has_triton() -> bool:
    """Whether Pallas still compiles Triton kernels; JAX 0.12 announces the end of support."""
    return importlib.util.find_spec("jax.experimental.pallas.triton") is not None


def _capability() -> float | None:
    """Compute capability of the present GPU; None if the program is for another device."""
    devices = jax.local_devices()
    present = getattr(devices[0], "compute_capability", None)
    return None if present is None else float(present)


def _widest_head() -> int:
    capability = _capability()
    return 256 if capability is None or capability >= 9 else 128


def _from_ampere() -> bool:
    capability = _capability()
    return capability is None or capability >= 8


def _has_cudnn() -> bool:
    return _from_ampere() and has_cuda()
