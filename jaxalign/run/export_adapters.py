"""Adapters for export: a weighted sum on a base, or extracted from a tuned model."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from jaxalign.hf import load_language_model, load_tokenizer
from jaxalign.hf.peft import PATTERNS
from jaxalign.hf.peft_sum import add_adapters
from jaxalign.hf.source import locate
from jaxalign.hf.tokenizer import own_tokenizer
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora_config import LoraConfig
from jaxalign.models.lora_extract import Extracted, extract_lora
from jaxalign.parallel.sharding import mesh_of
from jaxalign.run.export import Loaded


def with_weighted_adapters(loaded: Loaded, adapters: Sequence[tuple[str, float]]) -> Loaded:
    """Adds the weighted sum of adapters to a model, see `add_adapters`.

    Args:
      loaded: the base.
      adapters: (folder, `.gguf` file or hub id, weight) of each. The first adapter's tokenizer, if
        any, is exported.
    """
    weights: dict[pathlib.Path, float] = {}
    for source, weight in adapters:
        path = locate(source, PATTERNS)
        if path in weights:
            raise ValueError(f"--adapter {source}: wanted each adapter once")
        weights[path] = weight
    model, trained, frozen = add_adapters(loaded.model, loaded.params, weights)
    tok = own_tokenizer(adapters[0][0]) or loaded.tokenizer
    (base,) = loaded.sources
    sources = (base, *(source for source, _ in adapters))
    return Loaded(model, combine(trained, frozen), tok, tok, 0, sources, base)


def extracted_adapter(loaded: Loaded, base: str, rank: int) -> Loaded:
    """A tuned model as an adapter on its base, see `extract_lora`.

    Args:
      loaded: the tuned model.
      base: source of the base.
      rank: rank of the adapters of all projections.

    Raises:
      ValueError: a reward model, or a base of another shape.
    """
    if not isinstance(loaded.model, Decoder):
        raise ValueError("--base: wanted a language model, whose adapter is extracted")
    mesh = mesh_of(loaded.params)
    model, params = load_language_model(base, option="--base", mesh=mesh, dtype="float32")
    config = LoraConfig(rank=rank, alpha=float(rank))
    found = extract_lora(model, params, loaded.params, config)
    tok = loaded.tokenizer or load_tokenizer(base)
    sources, note = (*loaded.sources, base), _describe(found, rank)
    params = combine(found.trained, found.frozen)
    return Loaded(found.model, params, tok, loaded.exported, 0, sources, base, note)


def _describe(found: Extracted, rank: int) -> str:
    worst = min(found.kept, key=found.kept.__getitem__)
    mean = sum(found.kept.values()) / len(found.kept)
    lines = [
        f"adapters of rank {rank} hold {mean:.1%} of the squared change on average, least in "
        f"{worst} ({found.kept[worst]:.1%})"
    ]
    if found.left:
        lines.append(f"changed, and not in the adapter: {', '.join(found.left)}")
    return "\n".join(lines)
