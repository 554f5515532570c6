"""Key tables: which Hugging Face tensor holds which leaf of the parameter tree, and which part.

An `Entry` is a row of a family's table. Given a config and the parameters' shapes, `leaves` turns
the table into `Leaf`s (what to read for each of our arrays), and `tensors` turns those into
`Tensor`s (what to write for each of theirs). Neither knows a file format.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxalign.models.base import DecoderConfig
from jaxalign.types import Params


@dataclasses.dataclass(frozen=True)
class Part:
    """Which part of a fused HF tensor an entry is.

    Attributes:
      axis: of the HF tensor as it is stored, along which parts are joined.
      sizes: config → sizes of all parts along `axis`, in order.
      number: which of them this is, from 0.
    """

    axis: int
    sizes: Callable[[DecoderConfig], Sequence[int]]
    number: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a key table.

    A path may have several rows, for families whose checkpoints come in several forms: the first
    one is written, and a source is read by the first one of whose tensors it has any.

    Attributes:
      path: leaf of our parameter tree, e.g. "blocks/mlp/up/kernel".
      name: HF tensor name. Each "{}" stands for a leading axis of the leaf, which stacks as many
        tensors: "model.layers.{}.mlp.up_proj.weight" all layers, `[L, D, F]`;
        "model.layers.{}.experts.{}.w1.weight" all layers and experts, `[L, E, D, F]`.
      transpose: the last two axes are swapped: HF mostly keeps matrices `[out, in]`, we keep
        `[in, out]`.
      part: where the HF tensor joins several leaves, which part this one is; None for all of it.
    """

    path: str
    name: str
    transpose: bool = False
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """How one HF `model_type` maps to the shared decoder.

    Attributes:
      model_type: value of `model_type` in `config.json`.
      causal: architecture name of the language model.
      scorer: architecture name of the scalar-head model.
      table: HF names of the parameters.
      read: `config.json` as a dict, completed by `defaults` → `DecoderConfig`.
      write: `DecoderConfig` → the keys of `config.json` that `read` reads.
      defaults: keys that a `config.json` may leave out, with the values transformers takes then. A
        key that is there and null is not completed.
      ignored: patterns (as in `fnmatch`) of tensors that say nothing new, e.g. saved buffers.
    """

    model_type: str
    causal: str
    scorer: str
    table: tuple[Entry, ...]
    read: Callable[[Mapping[str, Any]], DecoderConfig]
    write: Callable[[DecoderConfig], dict[str, Any]]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ("*rotary_emb.inv_freq",)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a model's parameter tree and the HF tensors that make it up.

    An *item* is what one tensor contributes: the leaf without its `stacked` leading axes.

    Attributes:
      path: e.g. "blocks/mlp/up/kernel".
      shape: of the leaf, stacked axes (layers, experts) first.
      names: HF tensor names, one an item, in row-major order of the stacked axes.
      stacked: how many leading axes are stacked.
      transpose: whether the last two axes of each tensor are swapped.
      window: (axis, start, whole): the item is the part of the tensor from `start` on along its
        stored `axis`, whose whole size is `whole`. None where the item is the whole tensor.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: int = 0
    transpose: bool = False
    window: tuple[int, int, int] | None = None

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of what one tensor contributes, our way round."""
        return self.shape[self.stacked :]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each HF tensor, all of it, as stored."""
        shape = list(self._turn(self.item_shape))
        if self.window is not None:
            axis, _, whole = self.window
            shape[axis] = whole
        return tuple(shape)

    def index(self, bounds: Sequence[slice] | None = None) -> tuple[slice, ...]:
        """Where a block of an item (all of it by default) lies in the stored tensor.

        Args:
          bounds: a slice with start and stop for each axis of the item.
        """
        if bounds is None:
            bounds = [slice(0, size) for size in self.item_shape]
        index = list(self._turn(tuple(bounds)))
        if self.window is not None:
            axis, start, _ = self.window
            index[axis] = slice(start + index[axis].start, start + index[axis].stop)
        return tuple(index)

    def _turn(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*axes[:-2], axes[-1], axes[-2]) if self.transpose else axes


@dataclasses.dataclass(frozen=True)
class Piece:
    """An item of a leaf as part of an HF tensor.

    Attributes:
      leaf: whose.
      position: along the leaf's stacked axes; () if it has none.
    """

    leaf: Leaf
    position: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An HF tensor and the pieces that fill it.

    Attributes:
      name: HF name.
      shape: as stored.
      pieces: one, or several where the tensor is fused; together they cover it.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def leaves(
    family: Family,
    config: DecoderConfig,
    shapes: Params,
    present: Collection[str] | None = None,
) -> list[Leaf]:
    """Applies a family's table to the parameter tree of a model.

    Args:
      family: whose table.
      config: shape of the decoder.
      shapes: nested dict of things with a shape.
      present: tensor names of a source to be read; by default the form that is written.

    Raises:
      ValueError: a parameter that HF has no name for, e.g. an adapter.
    """
    rows: dict[str, list[Entry]] = {}
    for entry in family.table:
        rows.setdefault(entry.path, []).append(entry)
    found = []
    for path, leaf in flatten(shapes).items():
        if path not in rows:
            hint = "; merge adapters first (merge_lora)" if "lora_" in path else ""
            raise ValueError(
                f"parameter {path} has no Hugging Face name in {family.model_type}{hint}"
            )
        forms = [_leaf(entry, config, tuple(leaf.shape)) for entry in rows[path]]
        there = [form for form in forms if any(name in (present or ()) for name in form.names)]
        found.append([*there, *forms][0])
    return found


def _leaf(entry: Entry, config: DecoderConfig, shape: tuple[int, ...]) -> Leaf:
    stacked = entry.name.count("{}")
    positions = itertools.product(*map(range, shape[:stacked]))
    names = tuple(entry.name.format(*position) for position in positions)
    plain = Leaf(entry.path, shape, names, stacked, entry.transpose)
    if entry.part is None:
        return plain
    sizes, axis = tuple(entry.part.sizes(config)), entry.part.axis
    if plain.tensor_shape[axis] != sizes[entry.part.number]:
        # The table itself is wrong, not what a user gave.
        raise RuntimeError(f"{entry} with parts {sizes} does not fit a leaf of shape {shape}")
    return dataclasses.replace(plain, window=(axis, sum(sizes[: entry.part.number]), sum(sizes)))


def tensors(leaves: Sequence[Leaf]) -> list[Tensor]:
    """The HF tensors that leaves are written as, in the order of their first piece."""
    pieces: dict[str, list[Piece]] = {}
    for leaf in leaves:
        positions = itertools.product(*map(range, leaf.shape[: leaf.stacked]))
        for name, position in zip(leaf.names, positions, strict=True):
            pieces.setdefault(name, []).append(Piece(leaf, position))
    made = []
    for name, parts in pieces.items():
        shape = parts[0].leaf.tensor_shape
        covered = sum(math.prod(part.leaf.item_shape) for part in parts)
        if covered != math.prod(shape) or any(p.leaf.tensor_shape != shape for p in parts):
            # The table itself is wrong, not what a user gave.
            paths = ", ".join(part.leaf.path for part in parts)
            raise RuntimeError(f"{name} {shape} is not made up of exactly {paths}")
        made.append(Tensor(name, shape, tuple(parts)))
    return made


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
