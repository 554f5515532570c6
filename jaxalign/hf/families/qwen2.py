"""Qwen 2 and 2.5: Llama with biases on query, key and value; a window in the later layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import (
    COMMON,
    read_common,
    read_windows,
    write_common,
    write_layer_types,
)
from jaxalign.hf.families.llama import llama_table
from jaxalign.hf.families.table import Family
from jaxalign.hf.families.values import flag, get
from jaxalign.models.base import DecoderConfig

QWEN = COMMON | {
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
"""Defaults of all Qwens."""


def read_qwen_windows(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Layers from `max_window_layers` on have the window, if `use_sliding_window`."""
    if not flag(hf, "use_sliding_window"):
        hf = {**hf, "sliding_window": None}
    return read_windows(hf, lambda layer: layer >= get(hf, "max_window_layers", 28))


def write_qwen_windows(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_qwen_windows` reads; a disabled window keeps its size."""
    kinds = write_layer_types(config)
    keys: dict[str, Any] = {"use_sliding_window": config.window is not None, "layer_types": kinds}
    if config.window is not None:
        first = kinds.index("sliding_attention")
        keys |= {"sliding_window": config.window, "max_window_layers": first}
    return keys


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**read_common(hf), **read_qwen_windows(hf), qkv_bias=True)


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_common(config) | write_qwen_windows(config)


QWEN2 = Family(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    scorer="Qwen2ForSequenceClassification",
    table=llama_table(),
    read=_read,
    write=_write,
    defaults=QWEN,
)
