"""Extracts an adapter from two whole models: the largest singular vectors of their difference."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.adapters import principal_parts
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import (
    adapted_matrices,
    adapters_of,
    check_lora,
    leaf_at,
    leaves_of,
    matrix_of,
    module_name,
    split_saved,
)
from jaxalign.models.lora_config import LoraConfig
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.types import Params


class Extracted(NamedTuple):
    """An adapter that was extracted.

    Attributes:
      model: with adapters.
      trained: the adapters, and `modules_to_save` of the tuned model.
      frozen: the rest of the base.
      kept: matrix → share of the squared change that its adapter holds, 0 to 1.
      left: names of modules that changed but are not in the adapter.
    """

    model: Decoder
    trained: Params
    frozen: Params
    kept: dict[str, float]
    left: tuple[str, ...]


def extract_lora(model: Decoder, base: Params, tuned: Params, config: LoraConfig) -> Extracted:
    """The adapter of rank r that best approximates a change of weights (Eckart and Young).

    With the change tuned − base ≈ U·S·Vᵀ, truncated to rank r:

        s · A·B = U·S·Vᵀ

    Args:
      model: the model of both, without adapters.
      base: parameters before training.
      tuned: parameters after it.
      config: rank, α, targets and `modules_to_save`.

    Raises:
      ValueError: DoRA; parameters of different shapes; or as `add_lora`.
    """
    if config.dora or config.init == "pissa":
        raise ValueError("lora dora, init=pissa: an extracted adapter has neither")
    check_lora(model, config)
    before, after = dict(leaves_of(base)), dict(leaves_of(tuned))
    for path, leaf in before.items():
        got = after[path].shape if path in after else None
        if got != leaf.shape:
            raise ValueError(
                f"{'.'.join(path)} has the shape {leaf.shape} in the base and {got} in the tuned "
                "model; wanted two models of one shape"
            )
    adapted = dataclasses.replace(model, lora=config)
    split = jax.jit(principal_parts, static_argnames=("adapter", "stacked"))
    adapters = jax.tree.map(lambda x: x, adapters_of(adapted.shapes))
    kept, matrices = {}, adapted_matrices(model, config)
    for path, adapter in matrices.items():
        old, new = (matrix_of(tree, path).astype(jnp.float32) for tree in (base, tuned))
        a, b, rest = split(new - old, adapter=adapter, stacked=path[0] == "blocks")
        leaf_at(adapters, path[:-1]).update(lora_a=a, lora_b=b)
        whole = float(jnp.sum(jnp.square(new - old)))
        kept[module_name(path)] = 1 - float(jnp.sum(jnp.square(rest))) / whole if whole else 1.0
    mesh = mesh_of(base)
    if mesh is not None:
        shardings = param_shardings(adapters_of(adapted.axes), mesh, adapters_of(adapted.shapes))
        adapters = jax.device_put(adapters, shardings)
    saved, _ = split_saved(tuned, config)
    _, frozen = split_saved(base, config)
    done = {*matrices, *(path for path, _ in leaves_of(saved))}
    table = ("embed", "embedding")
    if model.config.tie_embeddings and ("head", "kernel") not in matrices and table in matrices:
        done.remove(table)  # the head is the same table and has no adapter
    left = [
        module_name(path)
        for path, leaf in before.items()
        if path not in done and not bool(jnp.array_equal(leaf, after[path]))
    ]
    trained = combine(adapters, saved)
    return Extracted(adapted, trained, frozen, kept, tuple(dict.fromkeys(left)))
