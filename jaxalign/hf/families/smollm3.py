"""SmolLM 3: Llama without positions in every fourth layer."""

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
from jaxalign.hf.families.llama import llama_table, read_biases
from jaxalign.hf.families.table import Family
from jaxalign.hf.families.values import flag, integer
from jaxalign.models.base import DecoderConfig


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    layers = integer(hf, "num_hidden_layers")
    rotated = hf.get("no_rope_layers")  # in spite of its name: 1 where there is rope
    if rotated is None:
        interval = integer(hf, "no_rope_layer_interval")
        rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise ValueError(f"config.json: no_rope_layers={rotated!r}: wanted 0 or 1 for each layer")
    rotated = tuple(bool(rope) for rope in rotated[:layers])
    windows = dict(hf) if flag(hf, "use_sliding_window") else {**hf, "sliding_window": None}
    return DecoderConfig(
        **read_common(hf),
        **read_biases(hf),
        **read_windows(windows, lambda layer: not rotated[layer]),
        rope_layers=rotated,
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_common(config) | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "no_rope_layers": [int(rope) for rope in config.rope_layers or (1,) * config.num_layers],
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


SMOLLM3 = Family(
    model_type="smollm3",
    causal="SmolLM3ForCausalLM",
    scorer="SmolLM3ForSequenceClassification",
    table=llama_table(),
    read=_read,
    write=_write,
    defaults=COMMON
    | {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
    },
)
