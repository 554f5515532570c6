"""PEFT's `adapter_config.json`: reads, checks and writes its options."""

from __future__ import annotations

import collections
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from jaxalign.hf.families.values import get
from jaxalign.hf.peft_modules import Module, Slot
from jaxalign.hf.source import ADAPTER_CONFIG as CONFIG
from jaxalign.hf.source import read_json, split_revision
from jaxalign.models.lora_config import LoraConfig, chooses, first_match

WEIGHTS = "adapter_model.safetensors"

T = TypeVar("T")

_ALL_LINEAR = "all-linear"

_REFUSED = {
    "lora_bias": "adapters with a bias",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "target_parameters": "adapters of bare parameters, such as fused experts",
    "trainable_token_indices": "single trained tokens",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "megatron_config": "Megatron's layers",
}
"""Keys that must be off, and what they mean."""

_BASE_KEPT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that do not change the base."""


def read_config(folder: pathlib.Path) -> dict[str, Any]:
    """Reads `adapter_config.json`.

    Raises:
      ValueError: no such file, a kind of adapter other than LoRA, or an unsupported option; the
        message names it.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type={kind!r} is not supported; supported: 'LORA'")
    for key, what in _REFUSED.items():
        if config.get(key):
            raise ValueError(
                f"{path}: {key}={config[key]!r} ({what}) is not supported; merge the adapter by "
                "PEFT (merge_and_unload) and give the merged folder"
            )
    if get(config, "bias", "none") != "none":
        raise ValueError(f"{path}: bias={config['bias']!r} is not supported; supported: 'none'")
    init = config.get("init_lora_weights", True)
    if init not in (*_BASE_KEPT, "pissa"):
        raise ValueError(
            f"{path}: init_lora_weights={init!r} changes the base when it is loaded, in a way that "
            "is not supported; let PEFT convert the adapter (save_pretrained with "
            "path_initial_model_for_weight_conversion) or merge it"
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if not _is_positive(value):
            raise ValueError(f"{path}: {key}={value!r}: wanted a positive number")
    try:
        _check_patterns(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _check_patterns(config: Mapping[str, Any]) -> None:
    """Checks the types and the regular expressions of the options that select modules."""
    patterns: list[str] = []
    for key in ("rank_pattern", "alpha_pattern"):
        value = get(config, key, {})
        numbers = isinstance(value, Mapping) and all(map(_is_positive, value.values()))
        if not numbers:
            raise ValueError(f"{key}={value!r}: wanted an object of positive numbers, or null")
        patterns += value
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = get(config, key, [])
        several = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not several and not (isinstance(value, str) and key != "modules_to_save"):
            raise ValueError(f"{key}={value!r}: wanted names, a regular expression or null")
        if isinstance(value, str) or key == "modules_to_save":
            patterns += [value] if isinstance(value, str) else value
    layers = get(config, "layers_to_transform", [])
    if not isinstance(layers, int) and not (
        isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)
    ):
        raise ValueError(f"layers_to_transform={layers!r}: wanted numbers of layers, or null")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from error


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """The scale of a module's B·A: α/r, or α/√r."""
    alpha = first_match(get(config, "alpha_pattern", {}), module, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def is_target(config: Mapping[str, Any], module: str) -> bool:
    """Whether `target_modules` selects a module; False if the module alone does not tell."""
    targets = config.get("target_modules")
    excluded = get(config, "exclude_modules", [])
    if isinstance(excluded, str):
        excluded = [name for name in [module] if re.fullmatch(excluded, name)]
    saved = [chooses(f"{name}(?:\\..*)?", module) for name in get(config, "modules_to_save", [])]
    if any(saved) or any(_ends_with(module, name) for name in excluded):
        return False
    if isinstance(targets, str):
        return targets != _ALL_LINEAR and re.fullmatch(targets, module) is not None
    if not targets or not any(_ends_with(module, name) for name in targets):
        return False
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    number = re.search(r"\.(\d+)\.", module)
    layers = [layers] if isinstance(layers, int) else layers
    return number is not None and int(number[1]) in layers


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def lora_config(
    config: Mapping[str, Any],
    found: Mapping[Slot, tuple[int, float]],
    slots: Sequence[Slot],
    saved: Sequence[str],
) -> LoraConfig:
    """The `LoraConfig` that describes an adapter that was read.

    Args:
      config: `adapter_config.json`.
      found: matrix → (rank, scale), for matrices with adapters.
      slots: all matrices of the model that can have adapters.
      saved: names of the modules that the adapter holds whole.
    """
    rslora = bool(config.get("use_rslora"))
    values = {
        slot: (rank, scale * (math.sqrt(rank) if rslora else rank))
        for slot, (rank, scale) in found.items()
    }
    rank = _most_common(rank for rank, _ in values.values())
    alpha = _most_common(alpha for _, alpha in values.values())
    targets: list[str] = []
    patterns: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in dict.fromkeys(slot.name for slot in slots):
        layers = [slot for slot in slots if slot.name == name]
        named = {slot: values[slot] for slot in layers if slot in values}
        if not named:
            continue
        alike = len(named) == len(layers) and len(set(named.values())) == 1
        keys = {name.rpartition(".")[2]: next(iter(named.values()))} if alike else {
            re.escape(slot.full_name): value for slot, value in named.items()
        }  # fmt: skip
        whole = len(named) == len(layers)
        targets += [name.rpartition(".")[2]] if whole else list(keys)
        for key, value in keys.items():
            for pattern, default, one in zip(patterns, (rank, alpha), value, strict=True):
                if one != default:
                    pattern[key] = one
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=tuple(targets),
        rank_pattern=patterns[0],
        alpha_pattern=patterns[1],
        rslora=rslora,
        dora=bool(config.get("use_dora")),
        init="pissa" if config.get("init_lora_weights") == "pissa" else "peft",
        modules_to_save=tuple(saved),
    )


def peft_config(
    lora: LoraConfig,
    adapted: Mapping[Module, tuple[int, float]],
    short: Mapping[str, str],
    *,
    saved: Sequence[str],
    scorer: bool,
    base: str | None,
) -> dict[str, Any]:
    """The `adapter_config.json` for adapters to be written.

    Args:
      lora: their options.
      adapted: module → (rank, scale).
      short: module → its shortest name that no other kind of module has, for all modules of the
        model.
      saved: modules to write whole.
      scorer: whether the model has a score head.
      base: source of the base.
    """
    values = {
        module.name: (rank, _plain(scale * (math.sqrt(rank) if lora.rslora else rank)))
        for module, (rank, scale) in adapted.items()
    }
    rank = _most_common(rank for rank, _ in values.values())
    alpha = _most_common(alpha for _, alpha in values.values())
    targets: list[str] = []
    patterns: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for kind in dict.fromkeys(short[name] for name in values):
        all_of_kind = [name for name, other in short.items() if other == kind]
        named = {name: values[name] for name in all_of_kind if name in values}
        whole = len(named) == len(all_of_kind)
        targets += [kind] if whole else list(named)
        alike = whole and len(set(named.values())) == 1
        keys = {kind: next(iter(named.values()))} if alike else named
        for key, value in keys.items():
            for pattern, default, one in zip(patterns, (rank, alpha), value, strict=True):
                if one != default:
                    pattern[re.escape(key)] = one
    name, revision = (None, None) if base is None else split_revision(base)
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if scorer else "CAUSAL_LM",
        "base_model_name_or_path": name,
        **({} if revision is None else {"revision": revision}),  # the key that PEFT reads
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": targets,
        "rank_pattern": patterns[0],
        "alpha_pattern": patterns[1],
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "lora_dropout": lora.dropout,
        "bias": "none",
        "fan_in_fan_out": any(module.conv1d for module in adapted),
        "init_lora_weights": "pissa" if lora.init == "pissa" else True,
        "modules_to_save": list(saved) or None,
    }


def _most_common(values: Iterable[T]) -> T:
    return collections.Counter(values).most_common(1)[0][0]


def _plain(value: float) -> float | int:
    """An integer if α is whole, as readers expect."""
    near = round(value)
    return near if near and abs(value - near) < 1e-9 * near else value
