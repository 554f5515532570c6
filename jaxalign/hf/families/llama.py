"""Llama 1 to 3, and models of the same architecture: SmolLM 1 and 2, TinyLlama, Yi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import COMMON, read_common, refuse_windows, write_common
from jaxalign.hf.families.table import Entry, Family
from jaxalign.hf.families.values import flag
from jaxalign.models.base import DecoderConfig

LAYER = "model.layers.{}."

PROJECTIONS = {
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
"""Llama's names of the projections; most later families use them too."""

NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}

QK_NORMS = {"attention/query_norm": "self_attn.q_norm", "attention/key_norm": "self_attn.k_norm"}


def llama_table(
    projections: Mapping[str, str] = PROJECTIONS, norms: Mapping[str, str] = NORMS
) -> tuple[Entry, ...]:
    """A key table in Llama's style.

    Args:
      projections: path in a block → HF name in a layer, for matrices with or without bias.
      norms: the same for norms.
    """
    rows = [
        Entry("embed/embedding", "model.embed_tokens.weight"),
        Entry("norm/scale", "model.norm.weight"),
        Entry("head/kernel", "lm_head.weight", transpose=True),
        Entry("score/kernel", "score.weight", transpose=True),
    ]
    for param, tensor in norms.items():
        rows.append(Entry(f"blocks/{param}/scale", f"{LAYER}{tensor}.weight"))
    for param, tensor in projections.items():
        rows.append(Entry(f"blocks/{param}/kernel", f"{LAYER}{tensor}.weight", transpose=True))
        rows.append(Entry(f"blocks/{param}/bias", f"{LAYER}{tensor}.bias"))
    return tuple(rows)


def read_biases(hf: Mapping[str, Any]) -> dict[str, Any]:
    """`attention_bias` covers all four projections of attention."""
    bias = flag(hf, "attention_bias")
    return {"qkv_bias": bias, "out_bias": bias, "mlp_bias": flag(hf, "mlp_bias")}


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse_windows(hf)
    return DecoderConfig(**read_common(hf), **read_biases(hf))


def _write(config: DecoderConfig) -> dict[str, Any]:
    bias = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_common(config) | bias


LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    scorer="LlamaForSequenceClassification",
    table=llama_table(),
    read=_read,
    write=_write,
    defaults=COMMON | {"max_position_embeddings": 2048},
)
