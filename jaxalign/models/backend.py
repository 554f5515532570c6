"""Every setting that depends on the platform, with the reason and the measurement behind it.

`backend()` reads the device that a program is traced for; a setting costs nothing at run time.
Which attention kernel runs where is a table of its own (`jaxalign.models.attention.dispatch`).

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
      default_dtype: of activations and matrix products where a run names none. CPUs emulate
        bfloat16 products; accelerators have units for them. Not measured.
      host_memory: arrays are in the host's memory already, so reading one copies nothing.
      unrolled_layers: a model with at most so many layers is traced layer after layer, without
        `lax.scan`. On a CPU the scan copies each layer's residuals into one stacked array and out
        again: a twelfth of a step of S. Accelerators write them in place. Compile time grows with
        the layers, hence a limit.
      kernel_gradient: how a projection's xᵀ·dy is formed. "transposed": xᵀ first, behind a
        barrier; XLA's CPU compiler otherwise merges the transposition into the arithmetic that
        makes dy, and runs along columns. A backward pass of S went from 95–99 to 107–125 GFLOP/s;
        measured again later, the difference was within the noise. "contracted": one contraction,
        with the axis that FSDP splits first, so that a TPU sums gradients by a reduce-scatter and
        not by an all-reduce of twice the bytes.
      rope_in_branch: sines and cosines are computed inside a `lax.cond` whose predicate is always
        true. XLA does not fuse across a `cond`; its CPU compiler otherwise fuses them into every
        rotation and computes them again for each layer and head. A step of S went from 0.58 to
        0.52 s, an update of PPO from 0.82 to 0.75 s (medians of three pairs).
      head_logit_bytes: most bytes of float32 logits that a device holds while it computes the
        vocabulary head. CPU: 128 MiB, not measured. Accelerators: a 32nd of the device's memory
        (2.3 GiB of an H100's), or half a GiB where that is unknown. With the bfloat16 gradient of
        the logits beside them, a chunk takes 1.5 times this.
      head_positions: most positions of all rows of a device that the head takes at a time; None:
        no limit. A chunk of P positions reads the head once, and reads and writes its float32
        gradient once: 2·P FLOPs for 2 bytes of the head, 2·P for 8 bytes of the gradient. An H100
        does 295 FLOPs while it moves a byte, a v5p 166: the gradient's product is bound by memory
        below P = 1,180 and 664. At 4,096 it is not, by a factor of three. Where only some
        positions count, the last chunk is computed whole: larger chunks would waste more. Not
        measured.
      head_row_positions: most positions of each row at a time; None: no limit. CPU: 512, beyond
        which logits leave the caches; not measured by itself.
      head_masked_row_positions: the same where only some positions count. CPU: 256; 1,024 answer
        tokens of PPO are 4 chunks of 256 or 3 of 508, which compute 1,524 positions. Head and
        gradient went from 460 to 300 ms of processor time.
      head_multiple: chunks are multiples of so many positions, where they can be: the rows of a
        float32 tile on a TPU. Not measured.
      decode_weights_by_layer: decoding slices the stacked weights once a call, not once a token. On
        a CPU a slice is a copy; with a cache of one array a layer this was two thirds of a decode
        step (generation of S 2.8 times, of M 1.9 times as fast as transformers). Accelerators read
        slices in place, and a second copy of the weights would cost memory.
      decode_stages: most loops that answers which begin together are written in, each with a cache
        as long as it fills. A column that is empty yet costs as much to read as a full one: with 4
        loops a step of M went from 24.0 and 25.9 to 23.4 and 21.3 ms (two pairs). Each loop is
        compiled, and between loops the cache is copied, for which accelerators lack the memory.
      decode_stage_columns: fewest columns by which such a cache grows. Not measured.
      attention_mask_length: longest rows for which XLA attention reads the mask from a matrix
        `[B, 1, T, T]`, made once for all layers. Longer ones form it block by block, so that memory
        is linear in the length. Not measured.
      attention_query_block: fewest queries that XLA attention takes at a time; smaller products do
        not keep a CPU core busy (docs/performance.md). Not measured on accelerators, where kernels
        run instead.
      attention_query_blocks: most blocks with key columns of their own. Causal rows need half of
        all products; 8 blocks save 7/16 of them.
      attention_long_row: key columns above which a quarter of `attention_query_block` is enough
        work. Not measured.
      attention_scores: attention scores that a device holds at a time, 16 MiB in float32. Not
        measured.
      gathered_bytes: most bytes of a layer's keys and values that a device gathers of whole rows
        where a ring could pass them round, in 1.7 times the bytes: a 64th of the device's memory.
        Not measured.
      splash_blocks: sides of splash attention's blocks, the preferred one first; larger blocks keep
        the matrix unit busier. Not measured.
      splash_padding: most padding that a larger block may add, as a part of the row. Not measured.
      pallas_interpret: TPU kernels run in Pallas' interpreter, which is slow and for tests.
      triton_interpret: the same of GPU kernels.
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
    attention_mask_length: int = 2048
    attention_query_block: int = 128
    attention_query_blocks: int = 8
    attention_long_row: int = 8192
    attention_scores: int = 2**22
    gathered_bytes: int = _GIB // 4
    splash_blocks: tuple[int, ...] = (512, 256, 128)
    splash_padding: float = 1 / 8
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
)


def backend(device: jax.Device | None = None) -> Backend:
    """The settings for a device.

    Args:
      device: by default what the program is traced for: the devices of the mesh in context, which
        need not be there, or without a mesh the default device.
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
    """Fills a set with the choices of the programs that are traced inside, a few words each."""
    choices: set[str] = set()
    token = _CHOICES.set(choices)
    try:
        yield choices
    finally:
        _CHOICES.reset(token)


def record_choice(text: str) -> None:
    """Records what a program that is being traced was given; see `recorded_choices`."""
    choices = _CHOICES.get()
    if choices is not None:
        choices.add(text)
