"""Which form of attention runs: one table of what each kernel covers, and the choice from it.

This is about whole rows, in training, scoring and prefill. Decoding reads its cache in a form of
its own (`jaxalign.models.attention.kv_cache`).
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
"""What may be asked for: by backend; the plain XLA form; splash attention; cuDNN's."""


class Choice(NamedTuple):
    """Which form runs, and why.

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
    """What is to be attended to.

    Attributes:
      dtype: of queries, keys and values.
      head_dim: width of a head.
      length: tokens of a row.
      softcap: whether scores are capped.
      branches: whether rows have branches.
      adrift: whether there are several devices and no mesh in context that says what lies where.
      platform: "cpu", "gpu" or "tpu".
      device_kind: what the device calls itself.
    """

    dtype: str
    head_dim: int
    length: int
    softcap: bool = False
    branches: bool = False
    adrift: bool = False
    platform: str = "cpu"
    device_kind: str = ""


LACKS: dict[str, tuple[tuple[Callable[[Case], bool], str], ...]] = {
    "splash": (
        (lambda case: case.branches, "it knows no branches"),
        (lambda case: case.dtype == "float16", "TPUs have no float16"),
        (lambda case: case.length < 128, "its least block is 128 tokens"),
        (lambda case: case.adrift, "no mesh in context splits it over the devices"),
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
"""Kernel → what it does not cover, in words. All else is covered; plain XLA covers everything."""

BY_BACKEND = {"tpu": "splash", "gpu": "cudnn"}
"""What "auto" asks for; "xla" elsewhere."""


def attention_kind(
    asked: str = "auto", *, dtype: str, head_dim: int, length: int, softcap: float | None = None,
    branches: bool = False, device: tuple[str, str] | None = None,
) -> Choice:  # fmt: skip
    """Decides which form of attention runs.

    Args:
      asked: one of `KINDS`. A kernel that is asked for by name gives way to the plain form too
        where it does not cover the case; "splash" off TPUs runs in Pallas' interpreter.
      dtype: of activations.
      head_dim: width of a head.
      length: tokens of a row.
      softcap: of the scores, or None.
      branches: whether rows have branches.
      device: platform and kind, as `current_device` gives; None: what it gives.

    Raises:
      ValueError: there is no such kind.
    """
    check_kind(asked)
    platform, device_kind = current_device() if device is None else device
    wanted = BY_BACKEND.get(platform, "xla") if asked == "auto" else asked
    if wanted == "xla":
        return Choice("xla", "asked for" if asked == "xla" else f"{platform} has no kernel here")
    case = Case(
        dtype=jnp.dtype(dtype).name,
        head_dim=head_dim,
        length=length,
        softcap=softcap is not None,
        branches=branches,
        adrift=jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1,
        platform=platform,
        device_kind=device_kind,
    )
    for lacks, why in LACKS[wanted]:
        if lacks(case):
            return Choice("xla", f"not {wanted}: {why}")
    return Choice(wanted, "asked for" if asked != "auto" else f"the kernel for {platform}")


def check_kind(asked: str) -> None:
    """Refuses what is no kind of attention.

    Raises:
      ValueError: it is not one of `KINDS`.
    """
    if asked not in KINDS:
        raise ValueError(f"attention={asked!r}: wanted one of {', '.join(KINDS)}")


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
