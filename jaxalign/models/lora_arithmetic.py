"""Adapter arithmetic: weighted sums, and the adapter between two full checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.base import LORA_TARGETS, LoraConfig
from jaxalign.types import Params


class Extracted(NamedTuple):
    """The adapter that approximates the difference of two checkpoints.

    Attributes:
      params: nested dict of `lora_a` `[L, in, r]` and `lora_b` `[L, r, out]`, float32.
      config: its configuration; α = r.
      lost: path of a kernel → ‖ΔW − A·B‖ / ‖ΔW‖ over all its layers, the share of its change that
        rank r cannot hold; 0 if nothing changed.
      other_changes: paths of other leaves that differ between the checkpoints, whose change no
        adapter holds.
    """

    params: Params
    config: LoraConfig
    lost: dict[str, float]
    other_changes: list[str]


def add_adapters(
    adapters: Sequence[tuple[Params, LoraConfig]], weights: Sequence[float]
) -> tuple[Params, LoraConfig]:
    """One adapter that changes each kernel by the weighted sum of several adapters' changes.

        ΔW = Σᵢ wᵢ · αᵢ/rᵢ · Aᵢ·Bᵢ

    The result is exact: its rank is the sum of their ranks. Adapters may have different ranks and
    targets.

    Args:
      adapters: (nested dict with `lora_a` `[…, in, r]` and `lora_b` `[…, r, out]`, configuration).
      weights: one finite number per adapter.

    Returns:
      (adapter, configuration), with r = Σᵢ rᵢ = α.

    Raises:
      ValueError: no adapters, a different number of weights, adapters of different models, or a
        kind of adapter whose change is not α/r · A·B.
    """
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"got {len(adapters)} adapters and {len(weights)} weights; wanted one or more, and one "
            "weight each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)}: wanted finite numbers")
    for _, config in adapters:
        if config != LoraConfig(rank=config.rank, alpha=config.alpha, targets=config.targets):
            raise ValueError(
                f"{config}: wanted adapters without other options than rank, alpha and targets; "
                "merge this one into its base instead"
            )
    flat = [dict(_pairs(params)) for params, _ in adapters]
    rank = sum(config.rank for _, config in adapters)
    targets = tuple(dict.fromkeys(name for _, config in adapters for name in config.targets))
    merged: Params = {}
    for path in dict.fromkeys(path for pairs in flat for path in pairs):
        a_parts, b_parts = [], []
        some_a, some_b = next(pairs[path] for pairs in flat if path in pairs)
        for pairs, (_, config), weight in zip(flat, adapters, weights, strict=True):
            if path not in pairs:  # this adapter does not change the kernel
                a_parts.append(jnp.zeros((*some_a.shape[:-1], config.rank), some_a.dtype))
                b_parts.append(
                    jnp.zeros((*some_b.shape[:-2], config.rank, some_b.shape[-1]), some_b.dtype)
                )
                continue
            a, b = pairs[path]
            if a.shape[:-1] != some_a.shape[:-1] or b.shape[-1] != some_b.shape[-1]:
                raise ValueError(
                    f"{path}: adapters of different models, for kernels "
                    f"{(*some_a.shape[:-1], some_b.shape[-1])} and {(*a.shape[:-1], b.shape[-1])}"
                )
            a_parts.append(a)
            b_parts.append(b * (weight * config.alpha / config.rank))
        leaf = {
            "lora_a": jnp.concatenate(a_parts, axis=-1),
            "lora_b": jnp.concatenate(b_parts, axis=-2),
        }
        _put(merged, path, leaf)
    return merged, LoraConfig(rank=rank, alpha=float(rank), targets=targets)


def extract_adapter(
    base: Params, tuned: Params, rank: int, targets: Sequence[str] = LORA_TARGETS
) -> Extracted:
    """The adapter of rank r that best approximates the change by training.

    The best approximation of W′ − W of rank r in the Frobenius norm is its truncated singular value
    decomposition U·Σ·Vᵀ (Eckart and Young 1936, https://doi.org/10.1007/BF02288367):

        A = U·√Σ,  B = √Σ·Vᵀ

    Args:
      base: parameters before training, without adapters.
      tuned: parameters after training, of the same shapes.
      rank: r; at most the smaller side of every kernel.
      targets: projections to adapt, from `LORA_TARGETS`.

    Raises:
      ValueError: parameters of different models, or a rank above a matrix's smaller side.
    """
    config = LoraConfig(rank=rank, alpha=float(rank), targets=tuple(targets))
    before, after = dict(_leaves(base)), dict(_leaves(tuned))
    odd = [p for p in before.keys() | after.keys() if _shape(before, p) != _shape(after, p)]
    if odd:
        path = sorted(odd)[0]
        raise ValueError(
            f"the checkpoints are of different models: {path} is {_shape(before, path)} in one and "
            f"{_shape(after, path)} in the other"
        )
    adapters: Params = {}
    lost, others = {}, []
    for path, old in before.items():
        parent, _, name = path.rpartition("/")
        if name != "kernel" or parent.rpartition("/")[2] not in targets or old.ndim != 3:
            if bool(jnp.any(old != after[path])):
                others.append(path)
            continue
        if rank > min(old.shape[-2:]):
            raise ValueError(
                f"rank={rank}: {path} is {old.shape[-2]}×{old.shape[-1]}, wanted at most "
                f"{min(old.shape[-2:])}"
            )
        leaf, lost[path] = _truncated(old, after[path], rank)
        _put(adapters, parent, leaf)
    return Extracted(adapters, config, lost, others)


def _truncated(old: jax.Array, new: jax.Array, rank: int) -> tuple[dict[str, jax.Array], float]:
    """A and B of every layer, one layer at a time, and the share of the change that they lose."""
    a, b, kept, whole = [], [], 0.0, 0.0
    for before, after in zip(old, new, strict=True):
        change = after.astype(jnp.float32) - before.astype(jnp.float32)
        u, s, v = jnp.linalg.svd(change, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        a.append(u[:, :rank] * root[None, :])
        b.append(root[:, None] * v[:rank])
        kept += float(jnp.sum(s[:rank] ** 2))
        whole += float(jnp.sum(s**2))
    share = math.sqrt(max(0.0, 1 - kept / whole)) if whole else 0.0
    return {"lora_a": jnp.stack(a), "lora_b": jnp.stack(b)}, share


def _pairs(node: Params, at: str = "") -> Iterator[tuple[str, tuple[jax.Array, jax.Array]]]:
    """(path, (A, B)) of every adapter in a tree."""
    if "lora_a" in node:
        yield at.removesuffix("/"), (node["lora_a"], node["lora_b"])
        return
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _pairs(value, f"{at}{name}/")


def _leaves(node: Params, at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{at}{name}/")
        else:
            yield at + name, value


def _put(tree: Params, path: str, leaf: Any) -> None:
    *above, last = path.split("/")
    for name in above:
        tree = tree.setdefault(name, {})
    tree[last] = leaf


def _shape(leaves: dict[str, Any], path: str) -> Any:
    return tuple(leaves[path].shape) if path in leaves else "missing"
