"""The exact weighted sum of several adapters of one base, as a single adapter.

    W + Σ wᵢ · sᵢ · Bᵢ·Aᵢ = W + [w₁s₁B₁ w₂s₂B₂ …] · [A₁; A₂; …]

so its rank is the sum of their ranks.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxalign.hf.gguf_lora import read_gguf_adapter
from jaxalign.hf.peft_config import read_config, scale_of
from jaxalign.hf.peft_read import PART, Adapted, put_adapter, read_tensors
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.types import Params


def add_adapters(
    model: Decoder | Scorer, params: Params, weights: Mapping[pathlib.Path, float]
) -> Adapted:
    """Puts the weighted sum of adapters on their base.

    Modules that are trained whole (a score head) come unchanged from the one adapter that has them.

    Args:
      model: the base.
      params: its parameters; shared, not copied.
      weights: an adapter's PEFT folder or `.gguf` file → its weight.

    Returns:
      (model with adapters, trainable parameters, frozen parameters), as `load_adapter`.

    Raises:
      ValueError: an adapter whose sum with others is not an adapter (DoRA, PiSSA); a whole module
        in two adapters, or in an adapter with a weight other than 1; or as `load_adapter`.
    """
    decoder = model.base if isinstance(model, Scorer) else model
    parts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    whole: dict[str, np.ndarray] = {}
    ends: dict[str, tuple[str, str]] = {}
    for path, weight in weights.items():
        config, tensors = _read(path, decoder)
        owned: dict[str, dict[str, tuple[str, np.ndarray]]] = {}
        for name, tensor in tensors.items():
            match = PART.fullmatch(name)
            if match is not None:
                end = name.removeprefix(match["module"])
                owned.setdefault(match["module"], {})[match["part"]] = end, tensor
            elif name in whole or weight != 1:
                raise ValueError(
                    f"{path}: {name} is trained whole, which cannot be weighted or taken from two "
                    "adapters; wanted a weight of 1, and it in one adapter only"
                )
            else:
                whole[name] = tensor
        for module, both in owned.items():
            if both.keys() != {"A", "B"}:
                raise ValueError(f"{path}: {module} has {', '.join(both)}, wanted A and B")
            (end_a, a), (end_b, b) = both["A"], both["B"]
            scale = np.float32(weight * scale_of(config, module, len(a)))
            parts.setdefault(module, []).append((a.astype(np.float32), scale * b))
            ends[module] = end_a, end_b
    tensors, ranks = dict(whole), {}
    for module, pairs in parts.items():
        end_a, end_b = ends[module]
        tensors[module + end_a] = np.concatenate([a for a, _ in pairs])
        tensors[module + end_b] = np.concatenate([b for _, b in pairs], axis=1)
        ranks[module] = len(tensors[module + end_a])
    config = {"peft_type": "LORA", "r": max(ranks.values(), default=1), "alpha_pattern": ranks}
    config |= {"target_modules": list(ranks)}  # α = r: B holds the scales
    return put_adapter(model, params, next(iter(weights)), config, tensors)


def _read(path: pathlib.Path, model: Decoder) -> tuple[Mapping[str, Any], dict[str, np.ndarray]]:
    if path.is_file():
        return read_gguf_adapter(path, model)
    config = read_config(path)
    if config.get("use_dora") or config.get("init_lora_weights") == "pissa":
        kind = "use_dora" if config.get("use_dora") else "init_lora_weights=pissa"
        raise ValueError(f"{path}: {kind}: its sum with other adapters is no adapter; merge it")
    return config, read_tensors(path)
