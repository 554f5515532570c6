"""Reads and writes PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from jaxalign.hf.gguf_lora import read_gguf_adapter
from jaxalign.hf.peft_config import CONFIG, WEIGHTS
from jaxalign.hf.peft_read import Adapted, put_adapter, read_adapter
from jaxalign.hf.peft_write import adapter_tensors, write_adapter
from jaxalign.hf.save import abbreviate, save_tokenizer, swap
from jaxalign.hf.source import locate
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import merge_lora
from jaxalign.models.scorer import Scorer
from jaxalign.parallel import distributed
from jaxalign.types import Params

PATTERNS = (CONFIG, WEIGHTS)
"""Files of an adapter."""

_OTHER_FILES = (
    "README.md",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates",
    "vocab.json",
    "merges.txt",
    "*.model",
    "export.json",  # a note by `jaxalign export --to`
    f"{WEIGHTS}.rejected",
)
"""Other files that a folder may hold and still be replaced."""


def load_adapter(
    model: Decoder | Scorer, params: Params, folder: str | os.PathLike[str]
) -> Adapted:
    """Puts an adapter on its base; PEFT, `save_adapter` or llama.cpp (GGUF) wrote the adapter.

    It reads ranks, α, rsLoRA, DoRA, patterns, PiSSA and modules that are trained whole (a score
    head, a resized embedding). If a transformers module holds several matrices, each of them gets
    an adapter.

    Args:
      model: the base, as `load_pretrained` returns it.
      params: its parameters; shared, not copied.
      folder: a folder with `adapter_config.json` and `adapter_model.safetensors`, a hub id, or an
        adapter's `.gguf` file.

    Returns:
      (model with adapters, trainable parameters, frozen parameters), like `add_lora`; the model is
      a `Scorer` if the adapter has a score head. `combine` both parameter trees for `model.apply`.

    Raises:
      ValueError: no adapter, an unsupported option of PEFT, or a base that does not fit the
        adapter; the message names the first module or shape that does not fit.
    """
    path = locate(folder, PATTERNS)
    decoder = model.base if isinstance(model, Scorer) else model
    if decoder.lora is not None:
        raise ValueError("the model already has adapters; merge them first (merge_lora)")
    if path.is_file():
        return put_adapter(model, params, path, *read_gguf_adapter(path, decoder))
    return read_adapter(model, params, path)


def load_adapters(
    model: Decoder | Scorer, params: Params, folders: Mapping[str, str | os.PathLike[str]]
) -> dict[str, Adapted]:
    """Loads several named adapters on one base; they share its parameters.

    Args:
      model, params: as for `load_adapter`.
      folders: name → folder, `.gguf` file or hub id.
    """
    return {name: load_adapter(model, params, folder) for name, folder in folders.items()}


def save_adapter(
    model: Decoder | Scorer,
    params: Params,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    tokenizer: Any = None,
) -> None:
    """Writes a folder that PEFT loads: adapters, and modules that are trained whole.

    `PeftModel.from_pretrained(base, folder)` gives the same logits. Saving is atomic. With several
    processes all call this with the same arguments; process 0 writes.

    Args:
      model: a model with adapters; a `Scorer` is written with its score head.
      params: base and adapters together (`combine(params, frozen)`), on one device or sharded.
      folder: the target. A folder with an adapter is replaced; a folder that holds anything else is
        an error.
      base: source of the base, for `base_model_name_or_path`; None: whoever loads the adapter must
        name it.
      tokenizer: saved in the folder with its chat template.

    Raises:
      ValueError: no adapters; adapters on experts, or PiSSA adapters on fused modules, which PEFT
        cannot represent; a folder that must not be replaced.
    """
    written = adapter_tensors(model, params, base)
    target = pathlib.Path(folder).expanduser().resolve()
    fresh = target.parent / f".{target.name}.{distributed.broadcast_random():08x}.tmp"
    main = distributed.is_main()
    try:
        with distributed.fail_together("saving an adapter"):
            if main:
                _check_replaceable(target)
                fresh.mkdir(parents=True)
                write_adapter(written, fresh)
                if tokenizer is not None:
                    save_tokenizer(tokenizer, fresh)
                swap(fresh, target)
    except BaseException:
        if main:
            shutil.rmtree(fresh, ignore_errors=True)
        raise


def merge_adapter(
    model: Decoder | Scorer, params: Params, folder: pathlib.Path
) -> tuple[Any, Params]:
    """A base with an adapter merged into it, as `load_pretrained` returns it."""
    adapted, trained, frozen = load_adapter(model, params, folder)
    decoder = adapted.base if isinstance(adapted, Scorer) else adapted
    plain, params = merge_lora(decoder, combine(trained, frozen))
    return (Scorer(plain, adapted.attributes) if isinstance(adapted, Scorer) else plain), params


def _check_replaceable(target: pathlib.Path) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a folder")
    allowed = (*PATTERNS, *_OTHER_FILES)
    others = [p.name for p in sorted(target.iterdir()) if not any(map(p.match, allowed))]
    if others:
        raise ValueError(
            f"{target} holds {abbreviate(others, 5)}, which an adapter does not; saving replaces "
            "the whole folder, so give a new one"
        )
