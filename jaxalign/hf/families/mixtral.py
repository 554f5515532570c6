"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import COMMON, read_common, write_common
from jaxalign.hf.families.llama import LAYER, PROJECTIONS, llama_table
from jaxalign.hf.families.mistral import read_window
from jaxalign.hf.families.table import Entry, Family, Part
from jaxalign.hf.families.values import integer, refuse
from jaxalign.models.base import DecoderConfig

ATTENTION = {
    param: tensor for param, tensor in PROJECTIONS.items() if param.startswith("attention/")
}


def expert_rows(block: str, names: Mapping[str, str]) -> tuple[Entry, ...]:
    """Router and experts, in both forms of checkpoints.

    We write one tensor per expert. transformers 5 may save its in-memory form: all experts in one
    tensor, with gate and up fused.

    Args:
      block: name of the mixture in a layer.
      names: projection of the parameter tree ("gate", "up", "down") → HF name.
    """
    rows = [
        Entry("blocks/mlp/router/kernel", f"{LAYER}{block}.gate.weight", transpose=True),
        Entry("blocks/mlp/router/kernel", f"{LAYER}mlp.gate.weight", transpose=True),
    ]
    for param, tensor in names.items():
        name = f"{LAYER}{block}.experts.{{}}.{tensor}.weight"
        rows.append(Entry(f"blocks/mlp/{param}/kernel", name, transpose=True))

    def halves(config: DecoderConfig) -> tuple[int, int]:
        return (config.intermediate_size,) * 2

    fused = LAYER + "mlp.experts."
    for i, param in enumerate(("gate", "up")):
        part = Part(axis=1, sizes=halves, number=i)
        rows.append(Entry(f"blocks/mlp/{param}/kernel", fused + "gate_up_proj", True, part))
    rows.append(Entry("blocks/mlp/down/kernel", fused + "down_proj", transpose=True))
    return tuple(rows)


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, "router_jitter_noise", "0 (no noise)", harmless=(0,))
    return DecoderConfig(
        **read_common(hf),
        **read_window(hf),
        num_experts=integer(hf, "num_local_experts"),
        experts_per_token=integer(hf, "num_experts_per_tok"),
        router_aux_coef=float(hf["router_aux_loss_coef"]),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    return write_common(config) | {
        "sliding_window": config.window,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.experts_per_token,
        "router_aux_loss_coef": config.router_aux_coef,
    }


MIXTRAL = Family(
    model_type="mixtral",
    causal="MixtralForCausalLM",
    scorer="MixtralForSequenceClassification",
    table=(
        *llama_table(ATTENTION),
        *expert_rows("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
    ),
    read=_read,
    write=_write,
    defaults=COMMON
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
)
