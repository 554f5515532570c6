"""Qwen 3 with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import COMMON, read_common, write_common
from jaxalign.hf.families.llama import NORMS, QK_NORMS, llama_table, read_biases
from jaxalign.hf.families.mistral import read_window
from jaxalign.hf.families.mixtral import ATTENTION, expert_rows
from jaxalign.hf.families.table import Family
from jaxalign.hf.families.values import flag, get, integer, refuse
from jaxalign.models.base import DecoderConfig


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    everywhere = "a mixture of experts in every layer"
    refuse(hf, "mlp_only_layers", f"[] ({everywhere})", harmless=([],))
    refuse(hf, "decoder_sparse_step", f"1 ({everywhere})", harmless=(1,))
    # moe_intermediate_size is for experts; intermediate_size is for layers without experts.
    sizes = {"intermediate_size": integer(hf, "moe_intermediate_size")}
    slides = flag(hf, "use_sliding_window")
    return DecoderConfig(
        **read_common({**hf, **sizes}),
        **read_biases(hf),
        **(read_window(hf) if slides else {}),
        qk_norm="head",
        num_experts=integer(hf, "num_experts", get(hf, "num_local_experts", 128)),
        experts_per_token=integer(hf, "num_experts_per_tok"),
        normalize_routing=flag(hf, "norm_topk_prob"),
        router_aux_coef=float(hf["router_aux_loss_coef"]),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    keys = write_common(config)
    size = keys.pop("intermediate_size")
    keys |= {
        "moe_intermediate_size": size,
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.window is not None,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "norm_topk_prob": config.normalize_routing,
        "router_aux_loss_coef": config.router_aux_coef,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    return keys if config.window is None else keys | {"sliding_window": config.window}


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    causal="Qwen3MoeForCausalLM",
    scorer="Qwen3MoeForSequenceClassification",
    table=(
        *llama_table(ATTENTION, NORMS | QK_NORMS),
        *expert_rows("mlp", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    ),
    read=_read,
    write=_write,
    defaults=COMMON
    | {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "router_aux_loss_coef": 0.001,
    },
)
