"""Key tables: which Hugging Face tensor, or which part of one, holds a leaf of the parameter tree.

An `Entry` is a row of a family's table. Given a config and the parameters' shapes, `leaves` turns
the table into `Leaf`s (the HF tensors to read for each parameter), and `tensors` turns those into
`Tensor`s (the parameters to write into each HF tensor). Neither depends on a file format.
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
    """A part of a fused HF tensor, such as the keys in a QKV matrix.

    Attributes:
      axis: axis of the stored HF tensor along which parts are concatenated.
      sizes: config → sizes of all parts along `axis`, in order.
      number: index of this part.
    """

    axis: int
    sizes: Callable[[DecoderConfig], Sequence[int]]
    number: int


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a key table.

    A path has several rows if checkpoints of the family exist in several forms. Saving uses the
    first; loading uses the first of which the checkpoint has any tensor.

    Attributes:
      path: leaf of the parameter tree, e.g. "blocks/mlp/up/kernel".
      name: HF tensor name. Each "{}" is a leading axis of the leaf, along which tensors are
        stacked: "model.layers.{}.mlp.up_proj.weight" gives `[L, D, F]`, and
        "model.layers.{}.experts.{}.w1.weight" gives `[L, E, D, F]`.
      transpose: whether to swap the last two axes: HF mostly stores matrices as `[out, in]`, the
        parameter tree as `[in, out]`.
      part: the part of a fused HF tensor; None: all of it.
    """

    path: str
    name: str
    transpose: bool = False
    part: Part | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """Maps one HF `model_type` to the shared decoder.

    Attributes:
      model_type: value of `model_type` in `config.json`.
      causal: architecture name of the language model.
      scorer: architecture name of the scalar-head model.
      table: HF names of the parameters.
      read: `config.json` as a dict, completed by `defaults` → `DecoderConfig`.
      write: `DecoderConfig` → the keys of `config.json` that `read` reads.
      defaults: transformers' defaults of keys that a `config.json` may omit. They do not replace a
        null.
      ignored: `fnmatch` patterns of redundant tensors, e.g. saved buffers.
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
    """A leaf of the parameter tree and the HF tensors that hold it.

    An *item* is the content of one tensor: the leaf without its `stacked` leading axes.

    Attributes:
      path: e.g. "blocks/mlp/up/kernel".
      shape: of the leaf, stacked axes (layers, experts) first.
      names: HF tensor names, one per item, in row-major order of the stacked axes.
      stacked: number of stacked leading axes.
      transpose: whether the last two axes of each tensor are swapped.
      window: (axis, start, size): the item starts at `start` along `axis` of the stored tensor,
        whose size along that axis is `size`. None: the item is the whole tensor.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str, ...]
    stacked: int = 0
    transpose: bool = False
    window: tuple[int, int, int] | None = None

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Shape of an item, in the axis order of the parameter tree."""
        return self.shape[self.stacked :]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each whole HF tensor, as stored."""
        shape = list(self._stored_order(self.item_shape))
        if self.window is not None:
            axis, _, size = self.window
            shape[axis] = size
        return tuple(shape)

    def index(self, bounds: Sequence[slice] | None = None) -> tuple[slice, ...]:
        """Index of a block of an item in the stored tensor.

        Args:
          bounds: for each axis of the item a slice with start and stop; None: the whole item.
        """
        if bounds is None:
            bounds = [slice(0, size) for size in self.item_shape]
        index = list(self._stored_order(tuple(bounds)))
        if self.window is not None:
            axis, start, _ = self.window
            index[axis] = slice(start + index[axis].start, start + index[axis].stop)
        return tuple(index)

    def _stored_order(self, axes: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*axes[:-2], axes[-1], axes[-2]) if self.transpose else axes


@dataclasses.dataclass(frozen=True)
class Piece:
    """An item of a leaf as part of an HF tensor.

    Attributes:
      leaf: the leaf.
      position: index of the item along the leaf's stacked axes; () if it has none.
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
      family: the family.
      config: config of the decoder.
      shapes: nested dict of arrays or `ShapeDtypeStruct`s.
      present: tensor names of a checkpoint to load; None: the form that is written.

    Raises:
      ValueError: a parameter without an HF name, e.g. an adapter.
    """
    rows: dict[str, list[Entry]] = {}
    for entry in family.table:
        rows.setdefault(entry.path, []).append(entry)
    result = []
    for path, leaf in flatten(shapes).items():
        if path not in rows:
            hint = "; merge adapters first (merge_lora)" if "lora_" in path else ""
            if "/kernel/" in path:
                hint = "; it is quantised: dequantise it first (merge_lora with dequantize=True)"
            raise ValueError(
                f"parameter {path} has no Hugging Face name in {family.model_type}{hint}"
            )
        forms = [_leaf(entry, config, tuple(leaf.shape)) for entry in rows[path]]
        stored = [form for form in forms if any(name in (present or ()) for name in form.names)]
        result.append([*stored, *forms][0])
    return result


def _leaf(entry: Entry, config: DecoderConfig, shape: tuple[int, ...]) -> Leaf:
    stacked = entry.name.count("{}")
    positions = itertools.product(*map(range, shape[:stacked]))
    names = tuple(entry.name.format(*position) for position in positions)
    plain = Leaf(entry.path, shape, names, stacked, entry.transpose)
    if entry.part is None:
        return plain
    sizes, axis = tuple(entry.part.sizes(config)), entry.part.axis
    if plain.tensor_shape[axis] != sizes[entry.part.number]:
        # A bug in the table, not a user's error.
        raise RuntimeError(f"{entry} with parts {sizes} does not fit a leaf of shape {shape}")
    return dataclasses.replace(plain, window=(axis, sum(sizes[: entry.part.number]), sum(sizes)))


def tensors(leaves: Sequence[Leaf]) -> list[Tensor]:
    """The HF tensors that hold the leaves, in the order of their first piece."""
    pieces: dict[str, list[Piece]] = {}
    for leaf in leaves:
        positions = itertools.product(*map(range, leaf.shape[: leaf.stacked]))
        for name, position in zip(leaf.names, positions, strict=True):
            pieces.setdefault(name, []).append(Piece(leaf, position))
    result = []
    for name, parts in pieces.items():
        shape = parts[0].leaf.tensor_shape
        covered = sum(math.prod(part.leaf.item_shape) for part in parts)
        if covered != math.prod(shape) or any(p.leaf.tensor_shape != shape for p in parts):
            # A bug in the table, not a user's error.
            paths = ", ".join(part.leaf.path for part in parts)
            raise RuntimeError(f"{name} {shape} is not made up of exactly {paths}")
        result.append(Tensor(name, shape, tuple(parts)))
    return result


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
