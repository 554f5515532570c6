"""Phi 3 and 4: Llama with fused projections, part of each head rotated, and longrope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import COMMON, read_common, write_common
from jaxalign.hf.families.llama import LAYER, llama_table
from jaxalign.hf.families.mistral import read_window
from jaxalign.hf.families.table import Entry, Family, Part
from jaxalign.models.base import DecoderConfig


def _heads(config: DecoderConfig) -> tuple[int, int, int]:
    kv = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, kv, kv


def _halves(config: DecoderConfig) -> tuple[int, int]:
    return config.intermediate_size, config.intermediate_size


def _fused() -> tuple[Entry, ...]:
    rows = []
    for name, sizes, parts in (
        ("self_attn.qkv_proj", _heads, ("attention/query", "attention/key", "attention/value")),
        ("mlp.gate_up_proj", _halves, ("mlp/gate", "mlp/up")),
    ):
        for i, part in enumerate(parts):
            where = Part(axis=0, sizes=sizes, number=i)
            rows.append(Entry(f"blocks/{part}/kernel", f"{LAYER}{name}.weight", True, where))
    return tuple(rows)


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    keys = dict(hf)
    for name in ("rope_parameters", "rope_scaling"):
        rope = keys.get(name)
        # Older configs use these names for longrope.
        if isinstance(rope, Mapping) and rope.get("rope_type", rope.get("type")) in ("su", "yarn"):
            keys[name] = {**rope, "rope_type": "longrope"}
    return DecoderConfig(**read_common(keys, partial_rope=True), **read_window(keys))


def _write(config: DecoderConfig) -> dict[str, Any]:
    keys = write_common(config) | {"sliding_window": config.window}
    rope = config.rope
    if rope.kind == "longrope":
        keys["original_max_position_embeddings"] = rope.original_max_positions
        # transformers 4 accepts exactly these three.
        keys["rope_scaling"] = {
            "type": "longrope",
            "short_factor": list(rope.short_factors),
            "long_factor": list(rope.long_factors),
        }
    return keys


PHI3 = Family(
    model_type="phi3",
    causal="Phi3ForCausalLM",
    scorer="Phi3ForSequenceClassification",
    table=(
        *llama_table({"attention/out": "self_attn.o_proj", "mlp/down": "mlp.down_proj"}),
        *_fused(),
    ),
    read=_read,
    write=_write,
    defaults=COMMON
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
)
