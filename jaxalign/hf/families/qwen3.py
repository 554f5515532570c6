"""Qwen 3: Qwen 2 with a norm on each head's queries and keys in place of the biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import read_common, write_common
from jaxalign.hf.families.llama import NORMS, QK_NORMS, llama_table, read_biases
from jaxalign.hf.families.qwen2 import QWEN, read_qwen_windows, write_qwen_windows
from jaxalign.hf.families.table import Family
from jaxalign.models.base import DecoderConfig


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf), **read_biases(hf), **read_qwen_windows(hf), qk_norm="head"
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    bias = {"attention_bias": config.qkv_bias}
    return write_common(config) | write_qwen_windows(config) | bias


QWEN3 = Family(
    model_type="qwen3",
    causal="Qwen3ForCausalLM",
    scorer="Qwen3ForSequenceClassification",
    table=llama_table(norms=NORMS | QK_NORMS),
    read=_read,
    write=_write,
    defaults=QWEN | {"head_dim": 128},
)
