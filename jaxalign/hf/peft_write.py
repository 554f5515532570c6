"""Writes adapters in PEFT's form: one adapter per transformers module.

A module that holds several matrices, such as Phi 3's `qkv_proj`, gets all their adapters: A₁, A₂
are concatenated and B₁, B₂ form a block diagonal. Its rank is the sum of their ranks.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxalign.hf import families
from jaxalign.hf.families.table import Tensor
from jaxalign.hf.peft_config import CONFIG, WEIGHTS, peft_config
from jaxalign.hf.peft_modules import Module, Slot, all_leaves, modules_of, short_names
from jaxalign.models.adapters import Adapter, column_lengths
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import Path, adapted_matrices, is_saved, leaf_at, matrix_of
from jaxalign.models.lora_config import LoraConfig
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.sharding import mesh_of, replicated
from jaxalign.types import Params

PREFIX = "base_model.model."
"""The prefix of PEFT's tensor names."""

Written = tuple[dict[str, Any], dict[str, np.ndarray]]
"""An adapter's configuration and tensors."""


def adapter_tensors(model: Decoder | Scorer, params: Params, base: str | None) -> Written:
    """`adapter_config.json` and the tensors of a model's adapters.

    With several processes all must call this; each gets the full result.

    Args:
      model: with adapters.
      params: base and adapters together.
      base: source of the base.

    Raises:
      ValueError: no adapters, or adapters that PEFT cannot represent.
    """
    decoder = model.base if isinstance(model, Scorer) else model
    lora = decoder.lora
    if lora is None:
        raise ValueError("the model has no adapters to save; save_pretrained writes whole models")
    scorer, modules = isinstance(model, Scorer), modules_of(decoder)
    if scorer:
        modules = {name: m for name, m in modules.items() if m.slots[0].path[0] != "head"}
    source = _Source(params, adapted_matrices(decoder, lora), lora)
    _check_written(decoder, lora, source.adapters, modules)
    tensors: dict[str, np.ndarray] = {}
    adapted: dict[Module, tuple[int, float]] = {}
    for module in modules.values():
        if any(source.rank(slot) for slot in module.slots):
            adapted[module], made = source.of_module(module)
            tensors |= {f"{PREFIX}{module.name}.{name}": value for name, value in made.items()}
    saved = _saved_tensors(model, params, lora)
    tensors |= {PREFIX + name: value for name, value in saved.items()}
    names = dict.fromkeys(name.rpartition(".")[0] for name in saved)
    short = {n: s for n, s in short_names(decoder).items() if not (scorer and n == "lm_head")}
    config = peft_config(
        lora, adapted, short, saved=_saved_names(list(names)), scorer=scorer, base=base
    )
    return config, tensors


def check_writable(model: Decoder | Scorer) -> None:
    """Checks that PEFT has a form for a model's adapters, before anything is computed.

    Raises:
      ValueError: it has none.
    """
    decoder = model.base if isinstance(model, Scorer) else model
    if decoder.lora is not None:
        adapters = adapted_matrices(decoder, decoder.lora)
        _check_written(decoder, decoder.lora, adapters, modules_of(decoder))


class _Source:
    """The adapters to write.

    Args:
      params: base and adapters.
      adapters: path of a matrix → its adapters.
      lora: their options.
    """

    def __init__(self, params: Params, adapters: dict[Path, Adapter], lora: LoraConfig):
        self.adapters = adapters
        self._params, self._lora = params, lora
        self._arrays: dict[Path, np.ndarray] = {}

    def rank(self, slot: Slot) -> int:
        """The rank of a matrix's adapter; 0 without one."""
        adapter = self.adapters.get(slot.path)
        return 0 if adapter is None else adapter.ranks[slot.layer or 0]

    def of_module(self, module: Module) -> tuple[tuple[int, float], dict[str, np.ndarray]]:
        """(rank, scale) of a module's adapter, and its tensors by the endings of their names."""
        parts = [(slot, self.rank(slot)) for slot in module.slots if self.rank(slot)]
        scale = self._scale(parts[0][0])
        total, row, columns = sum(rank for _, rank in parts), 0, []
        b = np.zeros((total, module.outputs), np.float32)
        for slot, rank in parts:
            at = () if slot.layer is None else (slot.layer,)
            columns.append(self._array(slot, "lora_a")[(*at, slice(None), slice(rank))])
            own = self._array(slot, "lora_b")[(*at, slice(rank))].astype(np.float32)
            # A module has a single scale: for matrices with another scale, B absorbs the
            # difference.
            own = own * np.float32(self._scale(slot) / scale)
            b[row : row + rank, slot.start : slot.start + slot.size] = own
            row += rank
        kind = "lora_embedding_{}" if module.is_embedding else "lora_{}.weight"
        dtype = columns[0].dtype
        made = {
            kind.format("A"): np.ascontiguousarray(np.concatenate(columns, axis=1).T),
            kind.format("B"): np.ascontiguousarray(b.T.astype(dtype)),
        }
        if self._lora.dora:
            made["lora_magnitude_vector"] = self._lengths(module).astype(dtype)
        return (total, scale), made

    def _lengths(self, module: Module) -> np.ndarray:
        """DoRA's magnitudes of a module; without an adapter, a matrix keeps its weight's norms."""
        result = []
        for slot in module.slots:
            at = slice(None) if slot.layer is None else slot.layer
            if self.rank(slot):
                result.append(self._array(slot, "lora_m")[at])
            else:
                matrix = matrix_of(self._params, slot.path)[at]
                result.append(whole_array(column_lengths(matrix)))
        return np.concatenate(result)

    def _scale(self, slot: Slot) -> float:
        return self.adapters[slot.path].scales[slot.layer or 0]

    def _array(self, slot: Slot, leaf: str) -> np.ndarray:
        path = (*slot.path[:-1], leaf)
        if path not in self._arrays:
            self._arrays[path] = whole_array(leaf_at(self._params, path))
        return self._arrays[path]


def write_adapter(written: Written, folder: pathlib.Path) -> None:
    """Writes the two files into an existing folder."""
    from safetensors.numpy import save_file

    config, tensors = written
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def whole_array(x: Any) -> np.ndarray:
    """A (sharded) array as numpy, whole on every process."""
    mesh = mesh_of(x)
    if mesh is None or x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(jax.jit(lambda x: x, out_shardings=replicated(mesh))(x).addressable_data(0))


def _check_written(
    model: Decoder,
    lora: LoraConfig,
    adapters: dict[Path, Adapter],
    modules: dict[str, Module],
) -> None:
    known = {slot.path for module in modules.values() for slot in module.slots}
    experts = [".".join(path[1:-1]) for path in adapters if path not in known]
    if experts:
        raise ValueError(
            f"PEFT has no form for adapters of experts, such as those of {', '.join(experts)}; "
            "merge them (merge_lora) and write the whole model, or adapt attention only"
        )
    fused = [
        module.name
        for module in modules.values()
        if len(module.slots) > 1 and any(slot.path in adapters for slot in module.slots)
    ]
    if lora.init == "pissa" and fused:
        raise ValueError(
            f"adapters with init=pissa of {fused[0]}: PEFT takes the singular vectors of the whole "
            f"module, which holds several matrices in {model.config.family}; merge them "
            "(merge_lora) and write the whole model"
        )


def _saved_tensors(
    model: Decoder | Scorer, params: Params, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """The HF tensors of modules that are trained whole."""
    decoder = model.base if isinstance(model, Scorer) else model
    outputs = max(1, len(model.attributes)) if isinstance(model, Scorer) else 1
    leaves = all_leaves(decoder, outputs)
    score = isinstance(model, Scorer)
    chosen = {
        leaf.path
        for leaf in leaves
        if is_saved(tuple(leaf.path.split("/")), lora) or (leaf.path == "score/kernel" and score)
    }
    if score:
        chosen.discard("head/kernel")
    else:
        chosen.discard("score/kernel")
        if decoder.config.tie_embeddings and "embed/embedding" in chosen:
            chosen.add("head/kernel")  # PEFT trains two copies where we train one
    tensors: dict[str, np.ndarray] = {}
    for tensor in families.tensors(leaves):
        if any(piece.leaf.path in chosen for piece in tensor.pieces):
            tensors[tensor.name] = _assembled(tensor, params)
    return tensors


def _assembled(tensor: Tensor, params: Params) -> np.ndarray:
    out: np.ndarray | None = None
    for piece in tensor.pieces:
        path = tuple(piece.leaf.path.split("/"))
        value = matrix_of(params, path)
        item = whole_array(value[piece.position] if piece.position else value)
        item = np.swapaxes(item, -1, -2) if piece.leaf.transpose else item
        if out is None:
            out = np.empty(tensor.shape, item.dtype)
        out[piece.leaf.index()] = item
    assert out is not None
    return out


def _saved_names(modules: Sequence[str]) -> list[str]:
    """Short names if they are unambiguous, because PEFT compares the ends of names as text."""
    short = ("score", "lm_head", "embed_tokens", "wte")
    return [
        name.rpartition(".")[2] if name.rpartition(".")[2] in short else name for name in modules
    ]
