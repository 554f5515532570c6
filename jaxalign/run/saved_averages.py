"""Reads only the weight averages from a checkpoint's optimizer state.

Orbax restores named tuples as dicts and tuples as lists; another optimizer's parameters are None.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxalign.algorithms.averages import schedule_free_average
from jaxalign.types import Params

_EMA, _SCHEDULE_FREE = {"average", "inner"}, {"b1", "z", "weight_sum"}


def wanted_averages(saved: Any, params: Params) -> Any:
    """The parts of an optimizer's state to restore in order to get its averages.

    Args:
      saved: its metadata in the checkpoint.
      params: nested dict of `ShapeDtypeStruct` with shardings: the parameters whose averages to
        read.

    Returns:
      The saved state's structure, with placeholders (or nothing) for everything except averages; {}
      if there are none.
    """
    if isinstance(saved, dict):
        if saved.keys() >= _EMA:
            return _named(average=_within(params, saved["average"]))
        if saved.keys() >= _SCHEDULE_FREE:
            z = _within(params, saved["z"])
            return _named(z=z) | {"b1": _scalar(params)} if z else {}
        return _named(**{str(k): wanted_averages(v, params) for k, v in saved.items()})
    if isinstance(saved, (list, tuple)):
        found = [wanted_averages(entry, params) for entry in saved]
        if not any(found):
            return {}
        return [
            new or jax.tree.map(lambda _: ..., old) for new, old in zip(found, saved, strict=True)
        ]
    return {}


def with_averages(params: Params, restored: Any) -> Params:
    """Replaces parameters by their averages, if there are any.

    Args:
      params: arrays of a checkpoint.
      restored: the result of restoring `wanted_averages` with Orbax.
    """
    for node in _nodes(restored):
        average, b1 = (node["average"], None) if "average" in node else (node["z"], node["b1"])
        params = _replace(params, average, b1)
    return params


def _named(**entries: Any) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if entry}


def _within(params: Params, saved: Any) -> Params:
    """The part of `params` that was saved, as float32."""
    found = {}
    for name, param in params.items():
        there = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(param, dict):
            inner = _within(param, there)
            if inner:
                found[name] = inner
        elif there is not None:
            found[name] = jax.ShapeDtypeStruct(param.shape, jnp.float32, sharding=param.sharding)
    return found


def _scalar(params: Params) -> jax.ShapeDtypeStruct:
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    return jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))


def _nodes(restored: Any) -> Iterator[dict[str, Any]]:
    """The restored states that hold an average."""
    if isinstance(restored, dict):
        if "average" in restored or {"z", "b1"} <= restored.keys():
            yield restored
            return
        restored = list(restored.values())
    if isinstance(restored, (list, tuple)):
        for entry in restored:
            yield from _nodes(entry)


def _replace(params: Params, average: Params, b1: Any) -> Params:
    replaced = dict(params)
    for name, value in average.items():
        param = params[name]
        if isinstance(value, dict):
            replaced[name] = _replace(param, value, b1)
        else:
            x = value if b1 is None else schedule_free_average(param, value, b1)
            replaced[name] = x.astype(param.dtype)
    return replaced
