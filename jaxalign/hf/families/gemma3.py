"""Gemma 3, the text model: Gemma 2 with norms on queries and keys, and two rotations.

Five of six layers have a window, and use a smaller rope theta than the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import read_windows
from jaxalign.hf.families.gemma2 import GEMMA, GEMMA_NORMS, read_gemma, write_gemma
from jaxalign.hf.families.llama import QK_NORMS, llama_table
from jaxalign.hf.families.rope import read_rope_object, write_rope_object
from jaxalign.hf.families.table import Family
from jaxalign.hf.families.values import get, integer
from jaxalign.models.base import DecoderConfig

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    pattern = integer(hf, "sliding_window_pattern")
    windows = read_windows(hf, lambda layer: (layer + 1) % pattern != 0)
    both = get(hf, "rope_parameters", {})
    if not isinstance(both, Mapping):
        raise ValueError(f"config.json: rope_parameters={both!r}: wanted an object or null")
    global_rope = get(both, _GLOBAL, get(hf, "rope_scaling", {}))
    rope = read_rope_object(hf, global_rope, f"rope_parameters.{_GLOBAL}", hf["rope_theta"])
    fields = read_gemma({**hf, "rope_parameters": None, "rope_scaling": None}) | {"rope": rope}
    # transformers ignores this key.
    fields["attention_softcap"] = None
    if windows:
        local_rope = get(both, _LOCAL, {})
        theta = hf["rope_local_base_freq"]
        fields["local_rope"] = read_rope_object(hf, local_rope, f"rope_parameters.{_LOCAL}", theta)
    return DecoderConfig(**fields, **windows, qk_norm="head")


def _write(config: DecoderConfig) -> dict[str, Any]:
    local = config.rope if config.local_rope is None else config.local_rope
    keys = write_gemma(config) | {"rope_local_base_freq": local.theta}
    del keys["attn_logit_softcapping"]
    keys["rope_parameters"] = {
        _GLOBAL: {"rope_theta": config.rope.theta, **write_rope_object(config.rope)},
        _LOCAL: {"rope_theta": local.theta, **write_rope_object(local)},
    }
    return keys


GEMMA3 = Family(
    model_type="gemma3_text",
    causal="Gemma3ForCausalLM",
    scorer="Gemma3TextForSequenceClassification",
    table=llama_table(norms=GEMMA_NORMS | QK_NORMS),
    read=_read,
    write=_write,
    defaults=GEMMA
    | {
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "sliding_window_pattern": 6,
    },
)
