"""Quantises a model's matrices while reading: only one layer's matrix is in floats at a time."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxalign.hf.blocks import Pool, Source, load_leaf
from jaxalign.hf.families import Leaf
from jaxalign.models.decoder import Decoder
from jaxalign.models.quantized import is_quantized, quantize
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.sharding import mesh_of, param_shardings, use_mesh
from jaxalign.types import Params


class QuantizedLeaves:
    """The leaves that a quantised model stores in 4 or 8 bits.

    Args:
      model: the model in floats.
      kind: the quantisation, see `jaxalign.models.quantized.QUANTIZED`.
      mesh: the mesh for the leaves; None: the default device.

    Attributes:
      model: the quantised model.
      paths: the leaves' paths, joined by "/".
    """

    def __init__(self, model: Decoder | Scorer, kind: str, mesh: Mesh | None):
        self.model = with_quantized_base(model, kind)
        self._kind, self._mesh = kind, mesh
        self._shapes = _quantized_nodes(self.model.shapes)
        self._axes = _quantized_nodes(self.model.axes)
        self.paths = frozenset(self._shapes)

    def load(
        self, source: Source, leaf: Leaf, sharding: Any, dtype: np.dtype, pool: Pool
    ) -> Params:
        """Reads a leaf, `[L, in, out]` or `[L, E, in, out]`, as the parts of `quantize`.

        A device holds its parts, and its shard of one `[in, out]` matrix.

        Args:
          source: the checkpoint.
          leaf: the leaf, in floats.
          sharding: the sharding of the leaf in floats; None: the default device.
          dtype: the dtype in which floats are read.
          pool: threads, see `jaxalign.hf.blocks.workers`.
        """
        shapes, layout = self._shapes[leaf.path], None
        if self._mesh is not None:
            layout = param_shardings(self._axes[leaf.path], self._mesh, shapes)
        if isinstance(sharding, NamedSharding):
            spec = PartitionSpec(*sharding.spec[leaf.stacked :])
            sharding = NamedSharding(sharding.mesh, spec)
        parts = _zeros(shapes, layout)
        write = _writer(self._kind, None if layout is None else tuple(sorted(layout.items())))
        positions = itertools.product(*map(range, leaf.shape[: leaf.stacked]))
        for name, position in zip(leaf.names, positions, strict=True):
            item = dataclasses.replace(leaf, shape=leaf.item_shape, names=(name,), stacked=0)
            matrix = load_leaf(source, item, dtype, sharding, pool)
            # Wait: otherwise more layers' floats would pile up before this layer is done.
            with use_mesh(self._mesh):
                parts = jax.block_until_ready(write(parts, matrix, np.array(position, np.int32)))
            del matrix
        return parts


def with_quantized_base(model: Decoder | Scorer, kind: str) -> Decoder | Scorer:
    """The same model with its base in 4 or 8 bits."""
    if isinstance(model, Scorer):
        return dataclasses.replace(model, base=dataclasses.replace(model.base, quantize=kind))
    return dataclasses.replace(model, quantize=kind)


def quantize_params(params: Params, model: Decoder | Scorer) -> Params:
    """Quantises parameters in floats for a quantised model, one layer's matrix at a time.

    Args:
      params: nested dict of arrays, without adapters.
      model: the quantised model.
    """
    kind = model.base.quantize if isinstance(model, Scorer) else model.quantize
    assert kind is not None
    run = jax.jit(functools.partial(quantize, kind=kind))

    def one(matrix: jax.Array) -> Params:
        if matrix.ndim == 2:
            return run(matrix)
        made = [one(matrix[number]) for number in range(matrix.shape[0])]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *made)

    def convert(params: Params, shapes: Params) -> Params:
        return {
            name: one(value)
            if is_quantized(shapes[name])
            else convert(value, shapes[name])
            if isinstance(value, dict)
            else value
            for name, value in params.items()
        }

    with use_mesh(mesh_of(params)):
        return convert(params, model.shapes)


def _quantized_nodes(tree: Params, prefix: str = "") -> dict[str, Params]:
    """Path joined by "/" → the parts there."""
    found: dict[str, Params] = {}
    for name, value in tree.items():
        if is_quantized(value):
            found[prefix + name] = value
        elif isinstance(value, dict):
            found |= _quantized_nodes(value, f"{prefix}{name}/")
    return found


@functools.lru_cache(maxsize=64)
def _writer(kind: str, layout: Any) -> Any:
    def write(parts: Params, matrix: jax.Array, position: jax.Array) -> Params:
        made, at = quantize(matrix, kind), tuple(position)

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            start = (*at, *(0,) * part.ndim)
            return jax.lax.dynamic_update_slice(whole, part[(None,) * len(at)], start)

        return {name: put(parts[name], made[name]) for name in parts}

    shardings = None if layout is None else dict(layout)
    return jax.jit(write, donate_argnums=0, out_shardings=shardings)


def _zeros(shapes: Params, layout: Any) -> Params:
    def make() -> Params:
        return {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}

    return jax.jit(make, out_shardings=layout)()
