"""OLMo 2: Llama with norms after attention and MLP, and over all queries and all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import COMMON, read_common, refuse_windows, write_common
from jaxalign.hf.families.llama import QK_NORMS, llama_table, read_biases
from jaxalign.hf.families.table import Family
from jaxalign.models.base import DecoderConfig

_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse_windows(hf)
    return DecoderConfig(**read_common(hf), **read_biases(hf), norm_place="after", qk_norm="width")


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_common(config) | {"attention_bias": config.qkv_bias}


OLMO2 = Family(
    model_type="olmo2",
    causal="Olmo2ForCausalLM",
    scorer="Olmo2ForSequenceClassification",
    table=llama_table(norms=_NORMS | QK_NORMS),
    read=_read,
    write=_write,
    defaults=COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
)
