"""Adapter arithmetic: ranks and scales in each layer, and the adapted matrices.

Layers are stacked, so all layers of a projection have adapters of the same rank, the largest of any
layer. In a layer with a lower rank, the extra columns of A and rows of B are 0. Their gradients are
then 0 too, and no optimizer changes them. If the scale differs between layers, B is scaled before
the scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.lora_config import LORA_TARGETS, LoraConfig, chooses, first_match
from jaxalign.types import Params

LEAVES = ("lora_a", "lora_b", "lora_m")
"""The leaves of a matrix's adapter: A `[in, r]`, B `[r, out]`, and for DoRA magnitudes `[out]`."""


class Adapter(NamedTuple):
    """The adapters of a matrix in all layers.

    Attributes:
      ranks: the rank in each layer; a single one for the embedding and the head. 0: the layer has
        no adapter.
      scales: the factor of A·B in each layer.
    """

    ranks: tuple[int, ...]
    scales: tuple[float, ...]

    @property
    def rank(self) -> int:
        """The number of columns of A, the same in every layer."""
        return max(self.ranks)

    @property
    def scale(self) -> float | None:
        """The scale of all layers; None if they differ."""
        return self.scales[0] if len(set(self.scales)) == 1 else None

    def mask(self) -> np.ndarray:
        """float32 `[layers, rank]`, 0 for the columns that a layer does not have."""
        return (np.arange(self.rank) < np.array(self.ranks)[:, None]).astype(np.float32)

    def scale_array(self, dims: int) -> float | np.ndarray:
        """The common scale, or the layers' scales as `[layers, 1, …]` with `dims` axes."""
        if self.scale is not None:
            return self.scale
        return np.array(self.scales, np.float32).reshape(-1, *(1,) * (dims - 1))


@functools.lru_cache(maxsize=1024)
def adapter_of(lora: LoraConfig | None, name: str, layers: int | None = None) -> Adapter | None:
    """The adapters of a matrix, or None.

    Args:
      lora: the options, or None.
      name: the matrix's name in a block, such as "attention.query"; "embed" or "lm_head" without
        `layers`.
      layers: the number of blocks.
    """
    if lora is None:
        return None
    ranks, scales = [], []
    for full in [name] if layers is None else [f"layers.{i}.{name}" for i in range(layers)]:
        found = any(chooses(pattern, full) for pattern in lora.targets)
        rank = first_match(lora.rank_pattern, full, lora.rank)
        ranks.append(rank if found else 0)
        alpha = first_match(lora.alpha_pattern, full, lora.alpha)
        scales.append(alpha / (math.sqrt(rank) if lora.rslora else rank))
    if not any(ranks):
        return None
    # The scale of a layer without an adapter does not matter.
    some = next(scale for rank, scale in zip(ranks, scales, strict=True) if rank)
    scales = [scale if rank else some for rank, scale in zip(ranks, scales, strict=True)]
    return Adapter(tuple(ranks), tuple(scales))


def frozen_layers(lora: LoraConfig | None, layers: int) -> int:
    """How many of the lowest layers training leaves alone, and the embedding with them.

    Args:
      lora: the options, or None.
      layers: the number of blocks, L.

    Returns:
      0 to L − 1; 0 without adapters, and with DoRA, which trains a norm in every layer.
    """
    if lora is None or lora.dora or adapter_of(lora, "embed") is not None:
        return 0
    if not set(lora.modules_to_save) <= {"norm", "lm_head", "score"}:
        return 0
    parts = {
        name: "mlp" if name in ("gate", "up", "down") else "attention" for name in LORA_TARGETS
    }
    adapters = [adapter_of(lora, f"{part}.{name}", layers) for name, part in parts.items()]
    lowest = [int(np.flatnonzero(adapter.ranks)[0]) for adapter in adapters if adapter is not None]
    return min(lowest, default=layers - 1)


def without_adapters(params: Params) -> Params:
    """All parameters except adapters, in new dictionaries."""
    kept = {}
    for name, value in params.items():
        if isinstance(value, dict):
            inner = without_adapters(value)
            if inner:
                kept[name] = inner
        elif name not in LEAVES:
            kept[name] = value
    return kept


def column_lengths(matrix: jax.Array) -> jax.Array:
    """Norms of the columns of `[…, in, out]`, float32 `[…, out]`."""
    return jnp.sqrt(jnp.sum(jnp.square(matrix.astype(jnp.float32)), axis=-2))


def length_factor(matrix: jax.Array, lengths: jax.Array) -> jax.Array:
    """m / ‖W‖ of each column, float32 `[…, out]`; ‖W‖ counts as a constant (DoRA, section 4.3)."""
    return lengths.astype(jnp.float32) / jax.lax.stop_gradient(column_lengths(matrix))


def adapted_matrix(matrix: jax.Array, adapter: Params, scale: float | np.ndarray) -> jax.Array:
    """The matrix that results from a matrix and its adapter: W + s·A·B, or DoRA's form.

    DoRA:

        m · (W + s·A·B) / ‖W + s·A·B‖

    column by column.

    Args:
      matrix: `[…, in, out]`.
      adapter: A and B under `lora_a` and `lora_b`, m under `lora_m`.
      scale: s, see `Adapter.scale_array`.

    Returns:
      `[…, in, out]`, in the wider of the dtypes.
    """
    whole = matrix + scale * (adapter["lora_a"] @ adapter["lora_b"])
    if "lora_m" not in adapter:
        return whole
    return whole * length_factor(whole, adapter["lora_m"])[..., None, :]


def adapted_rows(
    rows: jax.Array, ids: jax.Array, table: jax.Array, adapter: Params, scale: float
) -> jax.Array:
    """Rows of an adapted embedding table.

    Args:
      rows: the rows of the table itself, `[B, T, D]`.
      ids: int `[B, T]`.
      table: `[V, D]`; only DoRA reads it, for the norms of whole columns.
      adapter: as for `adapted_matrix`, with A `[V, r]`.
      scale: s.

    Returns:
      `[B, T, D]`.
    """
    down = jnp.take(adapter["lora_a"], ids, axis=0, mode="clip")  # [B, T, r]
    rows = rows + scale * (down @ adapter["lora_b"])
    if "lora_m" not in adapter:
        return rows
    whole = jax.lax.stop_gradient(table + scale * (adapter["lora_a"] @ adapter["lora_b"]))
    return rows * length_factor(whole, adapter["lora_m"])[None, None]


def principal_parts(
    matrix: jax.Array, adapter: Adapter, *, stacked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """PiSSA: the largest singular vectors as an adapter, and the rest of the matrix.

    With W ≈ U·S·Vᵀ, truncated to rank r:

        A = U·√(S/s),  B = √(S/s)·Vᵀ,  rest = W − s·A·B

    Args:
      matrix: `[layers, in, out]`, or `[in, out]`.
      adapter: ranks and scales.
      stacked: whether layers are stacked.

    Returns:
      (A, B, rest); A and B float32, the rest in the matrix's dtype.
    """

    def split(matrix: jax.Array, scale: jax.Array, mask: jax.Array) -> Any:
        wide = matrix.astype(jnp.float32)
        u, s, v = jnp.linalg.svd(wide, full_matrices=False)
        root = jnp.sqrt(s[: adapter.rank] / scale) * mask
        a, b = u[:, : adapter.rank] * root[None], root[:, None] * v[: adapter.rank]
        rest = wide - scale * jnp.matmul(a, b, precision="highest")
        return a, b, rest.astype(matrix.dtype)

    scales, mask = jnp.array(adapter.scales, jnp.float32), jnp.asarray(adapter.mask())
    if not stacked:
        return split(matrix, scales[0], mask[0])
    return jax.lax.map(lambda xs: split(*xs), (matrix, scales, mask))  # one layer at a time


def with_layer_scales(blocks: Params, lora: LoraConfig | None, layers: int) -> Params:
    """Scales B in stacked blocks if the scale differs between layers.

    Otherwise modules multiply by a constant, and the blocks are unchanged.
    """

    def scaled(node: Params, adapter: Adapter) -> Params:
        if adapter.scale is not None:
            return node
        b = node["lora_b"]
        return node | {"lora_b": b * jnp.asarray(adapter.scale_array(b.ndim), b.dtype)}

    return map_adapted(scaled, blocks, lora, layers)


def with_ranks(blocks: Params, lora: LoraConfig | None, layers: int) -> Params:
    """Zeros the columns of A in stacked blocks that exceed a layer's rank."""

    def masked(node: Params, adapter: Adapter) -> Params:
        if len(set(adapter.ranks)) == 1:
            return node
        a, mask = node["lora_a"], adapter.mask()
        mask = mask.reshape(layers, *(1,) * (a.ndim - 2), adapter.rank)
        return node | {"lora_a": a * jnp.asarray(mask, a.dtype)}

    return map_adapted(masked, blocks, lora, layers)


def map_adapted(
    function: Callable[[Params, Adapter], Params],
    blocks: Params,
    lora: LoraConfig | None,
    layers: int,
) -> Params:
    """Replaces every adapted matrix and its adapter in stacked blocks by a function of them."""
    if lora is None:
        return blocks

    def run(node: Params, path: tuple[str, ...]) -> Params:
        result = {k: run(v, (*path, k)) if isinstance(v, dict) else v for k, v in node.items()}
        adapter = adapter_of(lora, ".".join(path), layers) if "lora_a" in node else None
        return result if adapter is None else function(result, adapter)

    return run(blocks, ())
