"""What differs from one model family to the next: config keys, tensor names, nothing else.

A family maps the Hugging Face `config.json` to a `DecoderConfig` and back, and lists which HF
tensor holds which leaf of the parameter tree. The decoder itself is shared by all of them. To add
a family, write its two config functions and its table, and enter it in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.models.base import DecoderConfig, RopeConfig
from jaxalign.types import Params


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a key table.

    Attributes:
      path: leaf of our parameter tree, e.g. "blocks/mlp/up/kernel".
      name: HF tensor name; "{}" stands for the layer, in which case the leaf stacks all layers.
      transpose: HF keeps matrices `[out, in]`, we keep `[in, out]`.
    """

    path: str
    name: str
    transpose: bool = False


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a model's parameter tree and the HF tensors that make it up.

    Attributes:
      path: e.g. "blocks/mlp/up/kernel".
      shape: of the leaf, layers first where stacked.
      names: HF tensor names: one a layer where stacked, else one.
      stacked: whether the leaf has a leading layer axis.
      transpose: whether each tensor is stored transposed.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: bool
    transpose: bool

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each HF tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transpose else shape


@dataclasses.dataclass(frozen=True)
class Family:
    """How one HF `model_type` maps to the shared decoder.

    Attributes:
      model_type: value of `model_type` in `config.json`.
      causal: architecture name of the language model.
      scorer: architecture name of the scalar-head model.
      table: HF names of the parameters.
      read: `config.json` as a dict → `DecoderConfig`.
      write: `DecoderConfig` → the keys of `config.json` that `read` reads.
    """

    model_type: str
    causal: str
    scorer: str
    table: tuple[Entry, ...]
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]


def _llama_table() -> tuple[Entry, ...]:
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


# --- reading config.json -------------------------------------------------------------------------


def _unsupported(key: str, got: Any, supported: str) -> ValueError:
    return ValueError(f"config.json: {key}={got!r} is not supported; supported: {supported}")


def _get(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default where it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def _integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _get(hf, key, default)
    if value is None:
        raise ValueError(f"config.json: {key} is missing; it must be a positive integer")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key}={value!r}: wanted a positive integer")
    return value


def _number(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"config.json: {where}{key}={value!r}: wanted a positive number")
    return float(value)


def _rope(hf: Mapping[str, Any]) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before)."""
    new = hf.get("rope_parameters") is not None
    where = "rope_parameters." if new else "rope_scaling."
    rope = _get(hf, "rope_parameters", _get(hf, "rope_scaling", {}))
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {where[:-1]}={rope!r}: wanted an object or null")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise _unsupported(where + "rope_type", kind, "'default', 'linear', 'llama3'")
    part = rope.get("partial_rotary_factor", _get(hf, "partial_rotary_factor", 1.0))
    if part != 1.0:
        raise _unsupported("partial_rotary_factor", part, "1.0 (all of the head is rotated)")
    theta = {"rope_theta": rope.get("rope_theta", _get(hf, "rope_theta", 10000.0))}
    fields: dict[str, Any] = {"theta": _number(theta, "rope_theta", ""), "kind": kind}
    if kind != "default":
        fields["factor"] = _number(rope, "factor", where)
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            fields[key] = _number(rope, key, where)
        original = rope.get("original_max_position_embeddings")
        fields["original_max_positions"] = _integer(
            {where + "original_max_position_embeddings": original},
            where + "original_max_position_embeddings",
        )
    return RopeConfig(**fields)


def _common(hf: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """The fields that families of this shape read alike; refuses what the decoder lacks."""
    act = _get(hf, "hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise _unsupported("hidden_act", act, "'silu'")
    if hf.get("quantization_config") is not None:
        raise _unsupported(
            "quantization_config", hf["quantization_config"], "unquantised weights, or GGUF"
        )
    layers = _get(hf, "layer_types", [])
    odd = sorted({str(kind) for kind in layers} - {"full_attention"})
    if odd:
        raise _unsupported("layer_types", odd, "'full_attention' in every layer")
    heads = _integer(hf, "num_attention_heads")
    hidden = _integer(hf, "hidden_size")
    if hf.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"config.json: hidden_size={hidden} is not a multiple of num_attention_heads={heads}; "
            f"give head_dim"
        )
    return {
        "vocab_size": _integer(hf, "vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": _integer(hf, "intermediate_size"),
        "num_layers": _integer(hf, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _integer(hf, "num_key_value_heads", heads),
        "head_dim": _integer(hf, "head_dim", hidden // heads),
        "rope": _rope(hf),
        "norm_eps": _number({"rms_norm_eps": _get(hf, "rms_norm_eps", 1e-6)}, "rms_norm_eps", ""),
        "tie_embeddings": bool(_get(hf, "tie_word_embeddings", False)),
        "max_positions": _integer(hf, "max_position_embeddings", max_positions),
        "family": hf["model_type"],
        "source_config": json.dumps(dict(hf), sort_keys=True),
    }


def _read_llama(hf: Mapping[str, Any]) -> DecoderConfig:
    if hf.get("sliding_window") is not None and _get(hf, "use_sliding_window", True):
        raise _unsupported("sliding_window", hf["sliding_window"], "null (full attention)")
    bias = bool(_get(hf, "attention_bias", False))
    return DecoderConfig(
        **_common(hf, max_positions=2048),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(_get(hf, "mlp_bias", False)),
    )


def _read_qwen2(hf: Mapping[str, Any]) -> DecoderConfig:
    if _get(hf, "use_sliding_window", False) and _get(hf, "sliding_window", 4096) is not None:
        raise _unsupported("use_sliding_window", True, "false (full attention)")
    return DecoderConfig(**_common(hf, max_positions=32768), qkv_bias=True)


# --- writing config.json -------------------------------------------------------------------------


def _write_common(config: DecoderConfig) -> dict[str, Any]:
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


def _write_llama(config: DecoderConfig) -> dict[str, Any]:
    if config.qkv_bias != config.out_bias:
        raise ValueError(
            f"family llama: qkv_bias={config.qkv_bias} and out_bias={config.out_bias} cannot be "
            f"written: its attention_bias covers both; use family 'qwen2' for qkv_bias alone"
        )
    bias = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return _write_common(config) | bias


def _write_qwen2(config: DecoderConfig) -> dict[str, Any]:
    if not config.qkv_bias or config.out_bias or config.mlp_bias:
        raise ValueError(
            f"family qwen2 has biases on query, key and value only; got qkv_bias={config.qkv_bias},"
            f" out_bias={config.out_bias}, mlp_bias={config.mlp_bias}"
        )
    return _write_common(config) | {"use_sliding_window": False}


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            causal="LlamaForCausalLM",
            scorer="LlamaForSequenceClassification",
            table=_llama_table(),
            read=_read_llama,
            write=_write_llama,
        ),
        Family(
            model_type="qwen2",
            causal="Qwen2ForCausalLM",
            scorer="Qwen2ForSequenceClassification",
            table=_llama_table(),
            read=_read_qwen2,
            write=_write_qwen2,
        ),
    )
}
"""HF `model_type` → family."""

GENERATION = "_generation_config"
"""Key under which `source_config` carries the source's `generation_config.json`, if it had one."""


def find_family(name: Any) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: not one of `FAMILIES`.
    """
    if name not in FAMILIES:
        raise _unsupported("model_type", name, ", ".join(map(repr, FAMILIES)))
    return FAMILIES[name]


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The shape of the decoder that a Hugging Face `config.json` describes.

    Args:
      hf: the file as a dict, in the form of transformers 4 or 5.

    Raises:
      ValueError: a key that is missing or asks for something the decoder does not have; the
        message names the key, what it holds and what is supported.
    """
    return find_family(hf.get("model_type")).read(hf)


def is_scorer(hf: Mapping[str, Any]) -> bool:
    """Whether `config.json` describes a model with a scalar head.

    Raises:
      ValueError: an architecture that is neither a language model nor a scorer of its family, or
        more than one label.
    """
    family = find_family(hf.get("model_type"))
    names = _get(hf, "architectures", [family.causal])
    if names == [family.causal]:
        return False
    if names != [family.scorer]:
        raise _unsupported("architectures", names, f"{[family.causal]}, {[family.scorer]}")
    labels = hf.get("num_labels")
    if labels is None and hf.get("id2label") is not None:
        labels = len(hf["id2label"])
    if labels not in (None, 1):
        raise _unsupported("num_labels", labels, "1 (a scalar score)")
    return True


def config_to_hf(config: DecoderConfig, *, scorer: bool, dtype: str) -> dict[str, Any]:
    """The Hugging Face `config.json` of a model, readable by transformers 4 and 5.

    What the source's own config held beyond our fields (token ids, initialiser, …) is kept.

    Args:
      config: shape of the decoder.
      scorer: whether the model has a scalar head instead of a vocabulary head.
      dtype: of the saved weights, e.g. "bfloat16".
    """
    family = find_family(config.family)
    hf: dict[str, Any] = json.loads(config.source_config) if config.source_config else {}
    # torch_dtype is the older name of dtype; labels belong to the head, which may have changed.
    for key in (GENERATION, "torch_dtype", "num_labels", "id2label", "label2id"):
        hf.pop(key, None)
    if len(_get(hf, "layer_types", [])) != config.num_layers:
        hf.pop("layer_types", None)
    hf |= family.write(config)
    hf["architectures"] = [family.scorer if scorer else family.causal]
    hf["model_type"] = family.model_type
    hf["dtype"] = dtype
    if scorer:
        hf |= {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return hf


def leaves(config: DecoderConfig, shapes: Params) -> list[Leaf]:
    """Matches a model's parameter tree with the HF names of its family.

    Args:
      config: shape of the decoder.
      shapes: `model.shapes` of a `Decoder` or `Scorer`.

    Raises:
      ValueError: a parameter that HF has no name for, e.g. an adapter.
    """
    table = {entry.path: entry for entry in find_family(config.family).table}
    found = []
    for path, leaf in flatten(shapes).items():
        if path not in table:
            hint = "; merge adapters first (merge_lora)" if "lora_" in path else ""
            raise ValueError(f"parameter {path} has no Hugging Face name in {config.family}{hint}")
        entry = table[path]
        stacked = "{}" in entry.name
        layers = range(leaf.shape[0]) if stacked else (0,)
        names = tuple(entry.name.format(layer) for layer in layers)
        found.append(Leaf(path, tuple(leaf.shape), names, stacked, entry.transpose))
    return found


def flatten(tree: Params, prefix: str = "") -> dict[str, Any]:
    """A nested dict as a flat one with paths joined by "/"."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
