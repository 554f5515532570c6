"""Keys of `config.json` that most families share: read with checks, written in both dialects."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxalign.models.base import DecoderConfig, RopeConfig


def unsupported(key: str, got: Any, supported: str) -> ValueError:
    """The error for a value that the decoder does not cover."""
    return ValueError(f"config.json: {key}={got!r} is not supported; supported: {supported}")


def get(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default where it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; without a default the key must be there."""
    value = get(hf, key, default)
    if value is None:
        raise ValueError(f"config.json: {key} is missing; it must be a positive integer")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key}={value!r}: wanted a positive integer")
    return value


def number(values: Mapping[str, Any], key: str, where: str) -> float:
    """A positive number; `where` is the path of the object that holds the key, e.g. "rope."."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"config.json: {where}{key}={value!r}: wanted a positive number")
    return float(value)


def read_rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before)."""
    new = hf.get("rope_parameters") is not None
    where = "rope_parameters." if new else "rope_scaling."
    rope = get(hf, "rope_parameters", get(hf, "rope_scaling", {}))
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {where[:-1]}={rope!r}: wanted an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise unsupported(where + "rope_type", kind, "'default', 'linear', 'llama3'")
    part = rope.get("partial_rotary_factor", get(hf, "partial_rotary_factor", 1.0))
    if part != 1.0:
        raise unsupported("partial_rotary_factor", part, "1.0 (all of the head is rotated)")
    theta = {"rope_theta": rope.get("rope_theta", get(hf, "rope_theta", 10000.0))}
    fields: dict[str, Any] = {"theta": number(theta, "rope_theta", ""), "kind": kind}
    if kind != "default":
        fields["factor"] = number(rope, "factor", where)
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            fields[key] = number(rope, key, where)
        original = rope.get("original_max_position_embeddings")
        fields["original_max_positions"] = integer(
            {where + "original_max_position_embeddings": original},
            where + "original_max_position_embeddings",
        )
    return RopeConfig(**fields)


def read_common(hf: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The fields that families of this shape read alike; refuses what the decoder lacks."""
    act = get(hf, "hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise unsupported("hidden_act", act, "'silu'")
    if hf.get("quantization_config") is not None:
        raise unsupported(
            "quantization_config", hf["quantization_config"], "unquantised weights, or GGUF"
        )
    layers = get(hf, "layer_types", [])
    odd = sorted({str(kind) for kind in layers} - {"full_attention"})
    if odd:
        raise unsupported("layer_types", odd, "'full_attention' in every layer")
    heads = integer(hf, "num_attention_heads")
    hidden = integer(hf, "hidden_size")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; "
            f"give head_dim"
        )
    return {
        "vocab_size": integer(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": integer(hf, "intermediate_size"),
        "num_layers": integer(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": integer(hf, "num_key_value_heads", heads),
        "head_dim": integer(hf, "head_dim", hidden // heads),
        "rope": read_rope(hf),
        "norm_eps": number({"rms_norm_eps": get(hf, "rms_norm_eps", 1e-6)}, "rms_norm_eps", ""),
        "tie_embeddings": bool(get(hf, "tie_word_embeddings", False)),
        "max_positions": integer(hf, "max_position_embeddings", max_positions),
        "family": hf["model_type"],
        "source_config": json.dumps(dict(hf), sort_keys=True),
    }


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_common` reads."""
    rope = config.rope
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_positions
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        # transformers 5 reads the first, transformers 4 and most servers the other two; without
        # them they would fall back to theta = 10000 in silence.
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
    }
