"""Model families: the config keys and tensor names in which they differ.

A family maps Hugging Face's `config.json` to a `DecoderConfig` and back, and lists which HF tensor
holds which leaf of the parameter tree. All families share the decoder. To add a family, write a
file here with its two config functions and its table, and list it in `FAMILIES`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxalign.hf.families import table
from jaxalign.hf.families.gemma2 import GEMMA2
from jaxalign.hf.families.gemma3 import GEMMA3
from jaxalign.hf.families.gpt2 import GPT2
from jaxalign.hf.families.llama import LLAMA
from jaxalign.hf.families.mistral import MISTRAL
from jaxalign.hf.families.mixtral import MIXTRAL
from jaxalign.hf.families.olmo2 import OLMO2
from jaxalign.hf.families.phi3 import PHI3
from jaxalign.hf.families.qwen2 import QWEN2
from jaxalign.hf.families.qwen3 import QWEN3
from jaxalign.hf.families.qwen3_moe import QWEN3_MOE
from jaxalign.hf.families.rope import used_rope
from jaxalign.hf.families.smollm3 import SMOLLM3
from jaxalign.hf.families.table import Entry, Family, Leaf, Part, flatten, tensors, unflatten
from jaxalign.hf.families.values import get, integer, refuse, unsupported
from jaxalign.models.base import GENERATION, DecoderConfig
from jaxalign.types import Params

__all__ = [
    "FAMILIES",
    "GENERATION",
    "Entry",
    "Family",
    "Leaf",
    "Part",
    "attributes_of",
    "canonical",
    "config_from_hf",
    "config_to_hf",
    "find_family",
    "flatten",
    "is_scorer",
    "leaves",
    "tensors",
    "unflatten",
]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        SMOLLM3,
        MISTRAL,
        QWEN2,
        QWEN3,
        GEMMA2,
        GEMMA3,
        PHI3,
        OLMO2,
        GPT2,
        MIXTRAL,
        QWEN3_MOE,
    )
}
"""HF `model_type` → family."""

MAX_LAYERS = 10_000
"""The maximum number of layers of a model."""
MAX_LABELS = 10_000
"""The maximum number of outputs of a scorer."""

_UNNAMED = "LABEL_0"
"""transformers' name of the single, unnamed output of a head."""


def find_family(name: Any) -> Family:
    """The family of a `model_type`.

    Raises:
      ValueError: not one of `FAMILIES`.
    """
    if not isinstance(name, str) or name not in FAMILIES:
        raise unsupported("model_type", name, ", ".join(map(repr, FAMILIES)))
    return FAMILIES[name]


def config_from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The decoder config that a Hugging Face `config.json` describes.

    Args:
      hf: the file as a dict, in the form of transformers 4 or 5.

    Raises:
      ValueError: a missing key, or a value that the decoder does not support; names the key, its
        value and what is supported.
    """
    family = find_family(hf.get("model_type"))
    refuse(hf, "quantization_config", "unquantised weights, or GGUF", harmless=())
    for key in ("num_hidden_layers", "n_layer"):
        if hf.get(key) is not None and integer(hf, key) > MAX_LAYERS:
            raise unsupported(key, hf[key], f"at most {MAX_LAYERS}")
    source = json.dumps(dict(hf), sort_keys=True)
    try:
        config = family.read({**family.defaults, **hf})
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        # A list in place of a text, a text in place of a number, …
        raise ValueError(
            f"config.json: a value is of the wrong kind ({type(error).__name__}: {error}); get the "
            "file again"
        ) from error
    return dataclasses.replace(config, family=family.model_type, source_config=source)


def is_scorer(hf: Mapping[str, Any]) -> bool:
    """Whether `config.json` describes a model with a score head, of one or several outputs.

    Raises:
      ValueError: an architecture that is neither the language model nor the scorer of its family.
    """
    family = find_family(hf.get("model_type"))
    names = get(hf, "architectures", [family.causal])
    if names == [family.causal]:
        return False
    if names != [family.scorer]:
        raise unsupported("architectures", names, f"{[family.causal]}, {[family.scorer]}")
    return True


def attributes_of(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a scorer's outputs; empty for a single, unnamed score.

    Args:
      hf: `config.json` of a sequence classification model.

    Raises:
      ValueError: unnamed labels, or labels of a classification instead of a regression.
    """
    outputs = integer(hf, "num_labels", 1)
    if outputs > MAX_LABELS:
        raise unsupported("num_labels", outputs, f"at most {MAX_LABELS}")
    unnamed = {str(number): f"LABEL_{number}" for number in range(outputs)}
    labels = get(hf, "id2label", unnamed)
    if not isinstance(labels, dict):
        raise unsupported("id2label", labels, "an object of names")
    names = [labels.get(str(number), labels.get(number)) for number in range(len(labels))]
    count = get(hf, "num_labels", len(names))
    if not names or None in names or count != len(names) or len(set(names)) < len(names):
        raise unsupported("id2label", labels, f"names for num_labels={count} outputs, 0, 1, …")
    if len(names) > 1 and hf.get("problem_type") not in (None, "regression"):
        raise unsupported("problem_type", hf["problem_type"], "'regression' with several labels")
    return () if names == [_UNNAMED] else tuple(str(name) for name in names)


def config_to_hf(
    config: DecoderConfig, *, scorer: bool, dtype: str, attributes: Sequence[str] = ()
) -> dict[str, Any]:
    """The Hugging Face `config.json` of a model, readable by transformers 4 and 5.

    Keys of the source's config without a field here (token ids, initialiser, …) are kept.

    Args:
      config: config of the decoder.
      scorer: whether the model has a scalar head instead of a vocabulary head.
      dtype: of the saved weights, e.g. "bfloat16".
      attributes: names of the head's outputs; empty for a single score.

    Raises:
      ValueError: a field that the family's config cannot express, e.g. experts in a Llama.
    """
    family = find_family(config.family)
    # A model initialised here has no token ids. Null stops transformers from using its defaults,
    # which may exceed the vocabulary.
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    hf: dict[str, Any] = json.loads(config.source_config) if config.source_config else none
    # torch_dtype is the old name of dtype; labels describe the head, which may have changed. Custom
    # code (auto_map) is neither exported nor needed: transformers implements the family.
    for key in (
        GENERATION,
        "auto_map",
        "torch_dtype",
        "num_labels",
        "id2label",
        "label2id",
        "problem_type",
    ):
        hf.pop(key, None)
    if len(get(hf, "layer_types", [])) != config.num_layers:
        hf.pop("layer_types", None)
    hf |= family.write(config)
    hf["architectures"] = [family.scorer if scorer else family.causal]
    hf["model_type"] = family.model_type
    hf["dtype"] = dtype
    _check_expressed(config, hf)
    if scorer:
        names = list(attributes) if attributes else [_UNNAMED]
        hf["num_labels"] = len(names)
        hf["id2label"] = {str(number): name for number, name in enumerate(names)}
        hf["label2id"] = {name: number for number, name in enumerate(names)}
        if attributes:
            hf["problem_type"] = "regression"
    return hf


def _check_expressed(config: DecoderConfig, hf: Mapping[str, Any]) -> None:
    """Reads the written config back: fields for which the family has no key would differ."""
    before, after = canonical(config), canonical(config_from_hf(hf))
    lost = [
        f"{name}={before[name]!r} (would come back as {after[name]!r})"
        for name in before
        if before[name] != after[name]
    ]
    if lost:
        raise ValueError(
            f"a config.json of family {config.family!r} cannot express {', '.join(lost)}; "
            f"choose the family that has it"
        )


def canonical(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a config, with defaults filled in so that equal configs compare equal."""
    local = config.rope if config.local_rope is None else config.local_rope
    layers = config.num_layers
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    filled = {
        "source_config": "",
        "rope": None if config.learned_positions else used_rope(config.rope),
        "local_rope": None if config.window is None else used_rope(local),
        "rope_layers": config.rope_layers or (True,) * layers,
        "window_layers": config.window_layers or (config.window is not None,) * layers,
        "query_scale": round(scale, 12),
    }
    fields = dataclasses.fields(config)
    return {field.name: getattr(config, field.name) for field in fields} | filled


def leaves(
    config: DecoderConfig, shapes: Params, present: Collection[str] | None = None
) -> list[Leaf]:
    """Matches a model's parameter tree with the HF tensor names of its family.

    Args:
      config: config of the decoder.
      shapes: `model.shapes` of a `Decoder` or `Scorer`.
      present: tensor names of a checkpoint, to choose among the forms of the family's checkpoints;
        None: the form that is written.

    Raises:
      ValueError: a parameter without an HF name, e.g. an adapter.
    """
    return table.leaves(find_family(config.family), config, shapes, present)
