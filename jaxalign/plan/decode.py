"""The best possible decoding speed, by the roofline of one decode step.

A step reads every weight and all cached keys and values once. With W bytes of weights and S slots
of C columns of κ bytes, everything split over n devices:

    t = max((W + S C κ) / (n · bandwidth), S F / (n · peak), 2 · 2 L S D b (n − 1)/n / link)

F are the FLOPs of a token at column C. Each of L layers all-reduces its results twice, S × D
numbers of b bytes each. The `decode` line of the plan has the traffic of the run's own program:
with rules that shard weights, every step gathers them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models.base import DecoderConfig
from jaxalign.models.flops import Work, forward_flops
from jaxalign.parallel.chips import Chip

SLOTS = (64, 128, 256, 512)
"""Numbers of answers that are generated at the same time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeStep:
    """One token for every slot.

    Attributes:
      slots: answers that are generated at the same time.
      seconds: time of a step.
      tokens_per_second: total of all devices.
      bytes_per_token: bytes read from main memory, on all devices, for one token of one answer.
      bound: what limits it: "compute", "memory" or "links".
      fits: whether weights and cache are within the devices' memory.
    """

    slots: int
    seconds: float
    tokens_per_second: float
    bytes_per_token: float
    bound: str
    fits: bool


def decode_steps(
    config: DecoderConfig,
    params: Any,
    chip: Chip,
    devices: int,
    *,
    context: float,
    dtype: Any,
    cache_dtype: Any,
) -> tuple[DecodeStep, ...]:
    """The roofline for each of `SLOTS`.

    Args:
      config: the policy's config.
      params: its parameters, as shapes.
      chip: one device.
      devices: the number of devices over which weights and slots are split.
      context: the average number of columns of keys and values in a slot.
      dtype: dtype of weights and activations in a step.
      cache_dtype: dtype of keys and values.
    """
    size, kept = jnp.dtype(dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    weights = sum(math.prod(x.shape) for x in jax.tree.leaves(params)) * size
    if not config.tie_embeddings:
        weights -= config.vocab_size * config.hidden_size * size  # each slot reads one row of it
    columns = _columns(config, context)
    slot = 2 * config.num_kv_heads * config.head_dim * kept * columns
    flops = forward_flops(config, Work(1.0, columns / config.num_layers, 1.0))
    sent = 2 * 2 * config.num_layers * config.hidden_size * size * (devices - 1) / devices
    return tuple(_step(slots, weights, slot, flops, sent, chip, devices) for slots in SLOTS)


def _columns(config: DecoderConfig, context: float) -> float:
    """Columns over all layers; a layer with a window has at most the window."""
    short = context if config.window is None else min(context, config.window)
    if config.window is None or not config.window_layers:
        return config.num_layers * short
    return sum(short if windowed else context for windowed in config.window_layers)


def _step(
    slots: int, weights: float, slot: float, flops: float, sent: float, chip: Chip, devices: int
) -> DecodeStep:
    read = weights + slots * slot
    times = {
        "compute": slots * flops / (devices * chip.flops),
        "memory": read / (devices * chip.bandwidth),
        "links": slots * sent / chip.inner,
    }
    bound = max(times, key=lambda name: times[name])
    return DecodeStep(
        slots=slots,
        seconds=times[bound],
        tokens_per_second=slots / times[bound],
        bytes_per_token=read / slots,
        bound=bound,
        fits=read <= devices * chip.memory,
    )
