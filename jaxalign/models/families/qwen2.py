"""Qwen 2 and 2.5: Llama's names, with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.base import DecoderConfig
from jaxalign.models.families.fields import get, read_common, unsupported, write_common
from jaxalign.models.families.llama import llama_table
from jaxalign.models.families.table import Family


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    if get(hf, "use_sliding_window", False) and get(hf, "sliding_window", 4096) is not None:
        raise unsupported("use_sliding_window", True, "false (full attention)")
    return DecoderConfig(**read_common(hf, max_positions=32768), qkv_bias=True)


def _write(config: DecoderConfig) -> dict[str, Any]:
    if not config.qkv_bias or config.out_bias or config.mlp_bias:
        raise ValueError(
            f"family qwen2 has biases on query, key and value only; got qkv_bias={config.qkv_bias},"
            f" out_bias={config.out_bias}, mlp_bias={config.mlp_bias}"
        )
    return write_common(config) | {"use_sliding_window": False}


QWEN2 = Family(
    model_type="qwen2",
    causal="Qwen2ForCausalLM",
    scorer="Qwen2ForSequenceClassification",
    table=llama_table(),
    read=_read,
    write=_write,
)
