"""Every setting that depends on the platform, with the reason and the measurement behind it.

`backend()` looks at the device that a program is traced for; a setting costs nothing at run time. A
separate table chooses the attention kernel (`jaxalign.models.attention.dispatch`).

"S" and "M" are the sizes of `jaxalign bench`, measured on two CPU cores with AVX-512 (see
docs/performance.md). "Not measured" means that the value was chosen by reasoning.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import jax

from jaxalign.parallel.chips import chip_of
from jaxalign.parallel.shard_map import current_device

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """Settings for one kind of device. The defaults are those of accelerators.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      default_dtype: dtype of activations and matrix products if a run names none. CPUs emulate
        bfloat16 products; accelerators have units for them. Not measured.
      host_memory: arrays are already in host memory, so reading one copies nothing.
      unrolled_layers: a model with at most this many layers is unrolled instead of using
        `lax.scan`. On a CPU the scan copies each layer's residuals into one stacked array and out
        again, which takes a twelfth of a step of S. Accelerators write them in place. Compile time
        grows with the layers, hence the limit.
      kernel_gradient: how a projection's xᵀ·dy is computed. "transposed": first xᵀ, behind a
        barrier; otherwise XLA's CPU compiler fuses the transposition into the arithmetic that makes
        dy, and runs along columns. A backward pass of S went from 95–99 to 107–125 GFLOP/s; in a
        later measurement, the difference was within the noise. "contracted": one contraction, with
        the axis that FSDP splits first, so that a TPU sums gradients with a reduce-scatter instead
        of an all-reduce of twice the bytes.
      rope_in_branch: sines and cosines are computed inside a `lax.cond` whose predicate is always
        true. XLA does not fuse across a `cond`; otherwise its CPU compiler fuses them into every
        rotation and recomputes them for each layer and head. A step of S went from 0.58 to 0.52 s,
        a PPO update from 0.82 to 0.75 s (medians of three pairs).
      head_logit_bytes: the most bytes of float32 logits that a device holds while it computes the
        vocabulary head. CPU: 128 MiB, not measured. Accelerators: 1/32 of the device's memory (2.3
        GiB on an H100), or half a GiB if that is unknown. Together with the logits' bfloat16
        gradient, a chunk takes 1.5 times this.
      head_positions: the most positions, over all rows of a device, that the head computes at a
        time; None: no limit. A chunk of P positions reads the head once, and reads and writes its
        float32 gradient once: 2·P FLOPs for 2 bytes of the head, 2·P for 8 bytes of the gradient.
        An H100 does 295 FLOPs while it moves a byte, a v5p 166: so the gradient's product is
        memory-bound below P = 1,180 and 664. At 4,096 it is compute-bound by a factor of three or
        more. If only some positions count, the last chunk is still computed whole, so larger chunks
        would waste more. Not measured.
      head_row_positions: the most positions of each row at a time; None: no limit. CPU: 512, above
        which logits do not fit in the caches; not measured by itself.
      head_masked_row_positions: the same if only some positions count. CPU: 256; 1,024 answer
        tokens of PPO are 4 chunks of 256 or 3 of 508, which compute 1,524 positions. Head and
        gradient went from 460 to 300 ms of processor time.
      head_multiple: chunks are multiples of this many positions if possible: the rows of a float32
        tile on a TPU. Not measured.
      decode_weights_by_layer: decoding slices the stacked weights once a call, not once a token. On
        a CPU a slice is a copy; with a cache of one array a layer this was two thirds of a decode
        step (generation of S 2.8 times, of M 1.9 times as fast as transformers). Accelerators read
        slices in place, and a second copy of the weights would cost memory.
      decode_stages: the most loops for generating answers that begin together, each with a cache
        only as long as it fills. Reading an empty column costs as much as a full one: with 4 loops
        a step of M went from 24.0 and 25.9 to 23.4 and 21.3 ms (two pairs). Each loop is compiled,
        and between loops the cache is copied, for which accelerators lack the memory.
      decode_stage_columns: the fewest columns by which such a cache grows. Not measured.
      decode_free_tokens: n₀: a decode step of n tokens costs as much as n₀ + n tokens of a long
        text, n₀ of them for reading the weights. Speculation weighs its drafts by it, and a rollout
        its slots. CPU: 8; 3 of S and 10 of M by the steps of 1 to 16 rows on an AMD EPYC
        (`scripts/bench/refill.py`). Accelerators: FLOPs while a byte is moved, 295 on an H100, 240
        on a v5e; not measured.
      attention_mask_length: the longest rows for which XLA attention reads the mask from a matrix
        `[B, 1, T, T]`, made once for all layers. For longer rows the mask is computed block by
        block, so that memory is linear in the length. Not measured.
      attention_query_block: the fewest queries that XLA attention computes at a time; smaller
        products do not keep a CPU core busy (docs/performance.md). Not measured on accelerators,
        where kernels run instead.
      attention_query_blocks: the most blocks with their own range of key columns. Causal rows need
        half of all products; 8 blocks save 7/16 of all products.
      attention_long_row: the number of key columns above which a quarter of `attention_query_block`
        is enough work. Not measured.
      attention_scores: attention scores that a device holds at a time, 16 MiB in float32. Not
        measured.
      gathered_bytes: the most bytes of a layer's keys and values that a device gathers for whole
        rows, rather than passing them round a ring, which sends 1.7 times the bytes: 1/64 of the
        device's memory. Not measured.
      splash_blocks: sides of splash attention's blocks, the preferred one first; larger blocks keep
        the matrix unit busier. Not measured.
      splash_padding: the most padding that a larger block may add, as a fraction of the row. Not
        measured.
      update_in_branch: a train step updates its state inside a `lax.cond`, taken if the update is
        finite, instead of by `where` over the state. With `where`, XLA's CPU compiler computes the
        moments for themselves and again for the weights. Norm, check and AdamW of S's 7.4 million
        weights take 13–17 ms without a guard, 20–25 in a branch, and 49 with `where` (medians of
        60). On a v5p a branch would copy arrays: 36.1 GiB of temporary memory against 32.0 (SFT of
        8B on a v5p-8, by `plan`); on an H100 it would make the host wait for the predicate.
      pallas_interpret: TPU kernels run in Pallas' interpreter, which is slow and for tests.
      triton_interpret: the same for GPU kernels.
    """

    platform: str
    default_dtype: str = "bfloat16"
    host_memory: bool = False
    unrolled_layers: int = 0
    kernel_gradient: Literal["transposed", "contracted"] = "contracted"
    rope_in_branch: bool = False
    head_logit_bytes: int = _GIB // 2
    head_positions: int | None = 4096
    head_row_positions: int | None = None
    head_masked_row_positions: int | None = None
    head_multiple: int = 8
    decode_weights_by_layer: bool = False
    decode_stages: int = 1
    decode_stage_columns: int = 32
    decode_free_tokens: int = 240
    attention_mask_length: int = 2048
    attention_query_block: int = 128
    attention_query_blocks: int = 8
    attention_long_row: int = 8192
    attention_scores: int = 2**22
    gathered_bytes: int = _GIB // 4
    splash_blocks: tuple[int, ...] = (512, 256, 128)
    splash_padding: float = 1 / 8
    update_in_branch: bool = False
    pallas_interpret: bool = True
    triton_interpret: bool = True


_CPU = Backend(
    platform="cpu",
    default_dtype="float32",
    host_memory=True,
    unrolled_layers=8,
    kernel_gradient="transposed",
    rope_in_branch=True,
    head_logit_bytes=2**27,
    head_positions=None,
    head_row_positions=512,
    head_masked_row_positions=256,
    head_multiple=1,
    decode_weights_by_layer=True,
    decode_stages=4,
    decode_free_tokens=8,
    update_in_branch=True,
)


def backend(device: jax.Device | None = None) -> Backend:
    """The settings for a device.

    Args:
      device: by default the device that the program is traced for: a device of the mesh in context,
        which may be absent, or without a mesh the default device.
    """
    if device is None:
        return _backend(*current_device())
    return _backend(device.platform, device.device_kind)


@functools.lru_cache(maxsize=16)
def _backend(platform: str, device_kind: str) -> Backend:
    if platform == "cpu":
        return _CPU
    chip = chip_of(device_kind)
    settings = Backend(
        platform=platform,
        pallas_interpret=platform != "tpu",
        triton_interpret=platform != "gpu",
    )
    if chip is None:
        return settings
    return dataclasses.replace(
        settings, head_logit_bytes=chip.memory // 32, gathered_bytes=chip.memory // 64
    )


_CHOICES: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("choices", default=None)


@contextlib.contextmanager
def recorded_choices() -> Iterator[set[str]]:
    """Context that fills a set with the choices made for programs traced inside, in a few words."""
    choices: set[str] = set()
    token = _CHOICES.set(choices)
    try:
        yield choices
    finally:
        _CHOICES.reset(token)


def record_choice(text: str) -> None:
    """Records a choice for the program that is being traced; see `recorded_choices`."""
    choices = _CHOICES.get()
    if choices is not None:
        choices.add(text)
