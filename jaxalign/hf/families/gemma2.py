"""Gemma 2: norms on both sides, soft-capped scores and logits, a window in every other layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import (
    COMMON,
    read_activation,
    read_common,
    read_windows,
    write_activation,
    write_common,
    write_layer_types,
)
from jaxalign.hf.families.llama import llama_table, read_biases
from jaxalign.hf.families.table import Family
from jaxalign.hf.families.values import number, optional, refuse
from jaxalign.models.base import DecoderConfig

GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

GEMMA = COMMON | {
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""Defaults of both Gemmas."""


def read_gemma(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields common to both Gemmas: all except rope and windows."""
    refuse(hf, "use_bidirectional_attention", "false", harmless=(False,))
    fields = read_common(hf) | read_biases(hf)
    return fields | {
        "activation": read_activation(hf, "hidden_activation"),
        "norm": "rms_offset",
        "norm_place": "both",
        "query_scale": number(hf, "query_pre_attn_scalar", "") ** -0.5,
        "attention_softcap": optional(hf, "attn_logit_softcapping"),
        "logit_softcap": optional(hf, "final_logit_softcapping"),
        "embed_scale": math.sqrt(fields["hidden_size"]),
    }


def write_gemma(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_gemma` and the window's reader read."""
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    scalar = round(scale**-2, 6)
    activation = write_activation(config)
    return write_common(config) | {
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": config.qkv_bias,
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "sliding_window": config.window,
        "layer_types": write_layer_types(config),
    }


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    return DecoderConfig(**read_gemma(hf), **read_windows(hf, lambda layer: layer % 2 == 0))


GEMMA2 = Family(
    model_type="gemma2",
    causal="Gemma2ForCausalLM",
    scorer="Gemma2ForSequenceClassification",
    table=llama_table(norms=GEMMA_NORMS),
    read=_read,
    write=write_gemma,
    defaults=GEMMA
    | {
        "max_position_embeddings": 8192,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
)
