"""Which transformers module holds which matrices, because PEFT adapts modules.

A module may hold several matrices, as Phi 3's `qkv_proj` does. Each is a `Slot` of the module: a
range of its outputs.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

from jaxalign.hf import families
from jaxalign.hf.families import Leaf
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import Path, leaf_at, matrix_names, set_leaf
from jaxalign.models.scorer import Scorer
from jaxalign.types import Params


class Slot(NamedTuple):
    """A matrix within a module.

    Attributes:
      name: the matrix's name in `LoraConfig`, without its layer: "attention.query".
      path: the matrix's path in the parameter tree.
      layer: its layer; None outside the blocks.
      start, size: its range of the module's outputs.
    """

    name: str
    path: Path
    layer: int | None
    start: int
    size: int

    @property
    def full_name(self) -> str:
        """The name in `LoraConfig`, such as "layers.0.attention.query"."""
        return self.name if self.layer is None else f"layers.{self.layer}.{self.name}"


class Module(NamedTuple):
    """A transformers module that can have adapters.

    Attributes:
      name: its name in the model, such as "model.layers.0.self_attn.q_proj".
      inputs, outputs: sizes of its matrix.
      slots: the matrices it holds.
      conv1d: whether it stores its matrix as `[in, out]`.
    """

    name: str
    inputs: int
    outputs: int
    slots: tuple[Slot, ...]
    conv1d: bool

    @property
    def is_embedding(self) -> bool:
        """Whether the module is an embedding, which looks rows up."""
        return self.slots[0].path[0] == "embed"


def all_leaves(model: Decoder, outputs: int = 1) -> list[Leaf]:
    """The HF tensors of all parameters, including an untied head and a score head.

    Args:
      model: with or without adapters.
      outputs: the score head's outputs.
    """
    config = dataclasses.replace(model.config, tie_embeddings=False)
    plain = Decoder(config)
    scorer = Scorer(plain, tuple(map(str, range(outputs))))
    shapes = plain.shapes | {"score": scorer.shapes["score"]}
    return families.leaves(config, shapes)


def modules_of(model: Decoder) -> dict[str, Module]:
    """Name → module, for all modules that can have adapters; PEFT cannot represent experts.

    Args:
      model: with or without adapters.
    """
    paths = {path: name for name, path in matrix_names(model).items()}
    slots: dict[str, list[Slot]] = {}
    facts: dict[str, tuple[int, int, bool]] = {}
    for leaf in all_leaves(model):
        path = tuple(leaf.path.split("/"))
        if path not in paths or leaf.stacked > 1:
            continue
        inputs, size = leaf.item_shape
        axis, start, total = (None, 0, size) if leaf.window is None else leaf.window
        if axis is not None and axis != (0 if leaf.transpose else 1):
            # A bug in the table, not a user's error.
            raise RuntimeError(f"{leaf.path} is a part of the inputs of {leaf.names[0]}")
        for number, tensor in enumerate(leaf.names):
            name = tensor.removesuffix(".weight")
            layer = number if leaf.stacked else None
            slots.setdefault(name, []).append(Slot(paths[path], path, layer, start, size))
            facts[name] = inputs, total, not leaf.transpose and path[0] == "blocks"
    return {
        name: Module(
            name, *facts[name][:2], tuple(sorted(parts, key=lambda s: s.start)), facts[name][2]
        )
        for name, parts in slots.items()
    }


def short_names(model: Decoder) -> dict[str, str]:
    """Module → the shortest unambiguous end of its name: "q_proj", or "attn.c_proj"."""
    kinds: dict[str, set[str]] = {}
    for leaf in all_leaves(model):
        for name in leaf.names:
            module = name.rpartition(".")[0]
            kinds.setdefault(_kind(module), set()).add(module)
    short = {}
    for kind in kinds:
        words = kind.split(".")
        for count in range(1, len(words) + 1):
            end = ".".join(words[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in kinds) == 1:
                break
        short[kind] = end
    return {module: short[kind] for kind, modules in kinds.items() for module in modules}


def _kind(module: str) -> str:
    """A module's name without the numbers of layers and experts."""
    return ".".join(word for word in module.split(".") if not word.isdigit())


def tensor_positions(leaf: Leaf) -> list[tuple[int, ...]]:
    """Index of the item that each of a leaf's tensors holds."""
    return list(itertools.product(*map(range, leaf.shape[: leaf.stacked])))


def put(tree: Params, path: str, value: Any) -> None:
    """`set_leaf` for a path joined by "/"."""
    set_leaf(tree, tuple(path.split("/")), value)


def get(tree: Params, path: str) -> Any:
    """`leaf_at` for a path joined by "/"."""
    return leaf_at(tree, tuple(path.split("/")))
