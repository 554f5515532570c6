"""Reads and writes the keys of `config.json` that most families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.hf.families.rope import read_rope, write_rope
from jaxalign.hf.families.values import flag, get, integer, number, unsupported
from jaxalign.models.base import DecoderConfig

ACTIVATION_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Activation in `config.json` → activation of the decoder; the first name of each is written."""


def read_activation(hf: Mapping[str, Any], key: str) -> str:
    """The MLP's activation."""
    if hf.get(key) not in ACTIVATION_NAMES:
        raise unsupported(key, hf.get(key), ", ".join(map(repr, ACTIVATION_NAMES)))
    return ACTIVATION_NAMES[hf[key]]


def write_activation(config: DecoderConfig) -> str:
    """The MLP's activation, by transformers' name."""
    names = ACTIVATION_NAMES.items()
    return next(name for name, activation in names if activation == config.activation)


def read_common(hf: Mapping[str, Any], *, partial_rope: bool = False) -> dict[str, Any]:
    """The `DecoderConfig` fields common to most families; rejects features the decoder lacks.

    Args:
      hf: `config.json`, completed by the family's defaults.
      partial_rope: whether the family may rotate only part of each head.
    """
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
        "rope": read_rope(hf, partial=partial_rope),
        "norm_eps": number(hf, "rms_norm_eps", ""),
        "tie_embeddings": flag(hf, "tie_word_embeddings"),
        "max_positions": integer(hf, "max_position_embeddings"),
        "activation": read_activation(hf, "hidden_act"),
    }


def write_common(config: DecoderConfig) -> dict[str, Any]:
    """The keys that `read_common` reads."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": write_activation(config),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_positions,
        **write_rope(config.rope),
    }


COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
}
"""Defaults that most families share; see `Family.defaults`."""


# --- layers that differ --------------------------------------------------------------------------

_FULL, _SLIDING = "full_attention", "sliding_attention"


def refuse_windows(hf: Mapping[str, Any]) -> None:
    """Raises ValueError for windowed attention, in families with full attention in every layer."""
    if hf.get("sliding_window") is not None and flag(hf, "use_sliding_window", True):
        raise unsupported("sliding_window", hf["sliding_window"], "null (full attention)")
    unknown = sorted({str(kind) for kind in get(hf, "layer_types", [])} - {_FULL})
    if unknown:
        raise unsupported("layer_types", unknown, f"{_FULL!r} in every layer")


def read_windows(hf: Mapping[str, Any], default: Callable[[int], bool]) -> dict[str, Any]:
    """The window size and the layers that have it, from `sliding_window` and `layer_types`.

    Args:
      hf: `config.json`.
      default: layer (from 0) → whether it has a window; used if there is no `layer_types`.
    """
    layers = integer(hf, "num_hidden_layers")
    window = None if hf.get("sliding_window") is None else integer(hf, "sliding_window")
    if hf.get("layer_types") is None:
        windowed = tuple(default(layer) for layer in range(layers))
        if window is None:
            return {}
    else:
        unknown = sorted({str(kind) for kind in hf["layer_types"]} - {_FULL, _SLIDING})
        if unknown:
            raise unsupported("layer_types", unknown, f"{_FULL!r}, {_SLIDING!r}")
        windowed = tuple(kind == _SLIDING for kind in hf["layer_types"])
        if window is None and any(windowed):
            raise ValueError(f"config.json: layer_types has {_SLIDING!r}, but no sliding_window")
    return {"window": window, "window_layers": windowed} if any(windowed) else {}


def write_layer_types(config: DecoderConfig) -> list[str]:
    """The list that `read_windows` reads."""
    windowed = config.window_layers or (config.window is not None,) * config.num_layers
    return [_SLIDING if slides else _FULL for slides in windowed]
