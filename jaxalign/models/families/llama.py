"""Llama, and what is Llama under another name: SmolLM, TinyLlama, Yi."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.models.base import DecoderConfig
from jaxalign.models.families.fields import get, read_common, unsupported, write_common
from jaxalign.models.families.table import Entry, Family


def llama_table() -> tuple[Entry, ...]:
    """Llama's names, which most later families kept."""
    layer = "model.layers.{}."
    rows = [
        Entry("embed/embedding", "model.embed_tokens.weight"),
        Entry("blocks/attention_norm/scale", layer + "input_layernorm.weight"),
        Entry("blocks/mlp_norm/scale", layer + "post_attention_layernorm.weight"),
        Entry("norm/scale", "model.norm.weight"),
        Entry("head/kernel", "lm_head.weight", transpose=True),
        Entry("score/kernel", "score.weight", transpose=True),
    ]
    for ours, theirs in {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }.items():
        rows.append(Entry(f"blocks/{ours}/kernel", f"{layer}{theirs}.weight", transpose=True))
        rows.append(Entry(f"blocks/{ours}/bias", f"{layer}{theirs}.bias"))
    return tuple(rows)


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    if hf.get("sliding_window") is not None and get(hf, "use_sliding_window", True):
        raise unsupported("sliding_window", hf["sliding_window"], "null (full attention)")
    bias = bool(get(hf, "attention_bias", False))
    return DecoderConfig(
        **read_common(hf, max_positions=2048),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(get(hf, "mlp_bias", False)),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    if config.qkv_bias != config.out_bias:
        raise ValueError(
            f"family llama: qkv_bias={config.qkv_bias} and out_bias={config.out_bias} cannot be "
            f"written: its attention_bias covers both; use family 'qwen2' for qkv_bias alone"
        )
    bias = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return write_common(config) | bias


LLAMA = Family(
    model_type="llama",
    causal="LlamaForCausalLM",
    scorer="LlamaForSequenceClassification",
    table=llama_table(),
    read=_read,
    write=_write,
)
