"""Mistral: Llama with a sliding window in every layer, if the config sets one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import COMMON, read_common, write_common
from jaxalign.hf.families.llama import llama_table
from jaxalign.hf.families.table import Family
from jaxalign.hf.families.values import integer, refuse
from jaxalign.models.base import DecoderConfig


def read_window(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`sliding_window` for all layers; null is full attention."""
    refuse(hf, "layer_types", "null (all layers alike)", harmless=())
    window = None if hf.get("sliding_window") is None else integer(hf, "sliding_window")
    return {"window": window}


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**read_common(hf), **read_window(hf))


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_common(config) | {"sliding_window": config.window}


MISTRAL = Family(
    model_type="mistral",
    causal="MistralForCausalLM",
    scorer="MistralForSequenceClassification",
    table=llama_table(),
    read=_read,
    write=_write,
    defaults=COMMON
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
)
