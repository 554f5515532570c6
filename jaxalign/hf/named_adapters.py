"""Several named adapters on one base in memory, each with its tokenizer."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxalign.hf.load import load_pretrained
from jaxalign.hf.peft import load_adapter
from jaxalign.hf.source import ADAPTER_CONFIG, base_of, locate, read_json, same_source
from jaxalign.hf.tokenizer import load_tokenizer, own_tokenizer
from jaxalign.models.base import combine
from jaxalign.types import Params

BASE = "base"
"""The name of the model without an adapter."""


class Loaded(NamedTuple):
    """A model that is ready to run.

    Attributes:
      model: a `Decoder` or `Scorer`, with its adapter.
      params: all of its parameters; the base's arrays are shared with the other models.
      tokenizer: the adapter's own if its folder has one, else the base's.
    """

    model: Any
    params: Params
    tokenizer: Any


def load_with_adapters(
    source: str | os.PathLike[str],
    adapters: Mapping[str, str | os.PathLike[str]],
    **options: Any,
) -> dict[str, Loaded]:
    """Loads a model, and the same model with each of several adapters.

    The parameters of the base are in memory once. If an adapter names another base of the same
    shape, a line on standard error says so.

    Args:
      source: the base: a folder, `.gguf` file or hub id.
      adapters: name → folder of PEFT, `.gguf` file of an adapter, or hub id.
      **options: those of `load_pretrained`.

    Returns:
      Name → model: the adapters in their order, then `BASE`.

    Raises:
      ValueError: as `load_pretrained`, `load_tokenizer` and `load_adapter`.
    """
    tok = load_tokenizer(source)
    model, params = load_pretrained(source, **options)
    loaded = {}
    for name, folder in adapters.items():
        adapted, trained, frozen = load_adapter(model, params, folder)
        _note_other_base(name, folder, source)
        own = own_tokenizer(folder)
        loaded[name] = Loaded(adapted, combine(trained, frozen), tok if own is None else own)
    return loaded | {BASE: Loaded(model, params, tok)}


def _note_other_base(
    name: str, adapter: str | os.PathLike[str], source: str | os.PathLike[str]
) -> None:
    path = locate(adapter, (ADAPTER_CONFIG,))
    named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") if path.is_dir() else ""
    if named and not same_source(base_of(path), source):
        print(f"note: the adapter {name} names the base {named}, not {source}", file=sys.stderr)
