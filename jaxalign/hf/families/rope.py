"""Rotary embeddings in `config.json`, in the dialects of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.values import flag, get, integer, number, unsupported
from jaxalign.models.base import ROPE_KINDS, RopeConfig

_ORIGINAL = "original_max_position_embeddings"

# Kind → field of `RopeConfig` → key of `config.json`, for required and for optional numbers.
_REQUIRED: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
    },
}
_OPTIONAL: dict[str, dict[str, str]] = {
    "yarn": {
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
    },
    "longrope": {"attention_factor": "attention_factor"},
}
_LISTS = {"short_factors": "short_factor", "long_factors": "long_factor"}


def read_rope(hf: Mapping[str, Any], *, partial: bool = False) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before)."""
    where = "rope_scaling" if hf.get("rope_parameters") is None else "rope_parameters"
    return read_rope_object(hf, get(hf, where, {}), where, hf.get("rope_theta"), partial=partial)


def read_rope_object(
    hf: Mapping[str, Any], rope: Any, where: str, theta: Any, *, partial: bool = False
) -> RopeConfig:
    """Reads one object of rope parameters.

    Args:
      hf: `config.json`.
      rope: the object.
      where: its key, for errors.
      theta: used if the object has none.
      partial: whether the family may rotate only part of each head.
    """
    if not isinstance(rope, Mapping):
        raise ValueError(f"config.json: {where}={rope!r}: wanted an object or null")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise unsupported(where, dict(rope), "the same for all layers")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise unsupported(f"{where}.rope_type", kind, ", ".join(map(repr, ROPE_KINDS)))
    part = rope.get("partial_rotary_factor", get(hf, "partial_rotary_factor", 1.0))
    part = number({"partial_rotary_factor": part}, "partial_rotary_factor", "")
    if part != 1.0 and not partial:
        raise unsupported("partial_rotary_factor", part, "1.0 (all of the head is rotated)")
    theta = {"rope_theta": rope.get("rope_theta", theta)}
    fields: dict[str, Any] = {
        "theta": number(theta, "rope_theta", ""),
        "kind": kind,
        "fraction": part,
    }
    for field, key in _REQUIRED.get(kind, {}).items():
        fields[field] = number(rope, key, f"{where}.")
    for field, key in _OPTIONAL.get(kind, {}).items():
        if rope.get(key) is not None:
            fields[field] = number(rope, key, f"{where}.")
    return RopeConfig(**fields, **_context(hf, rope, kind, where))


def _context(hf: Mapping[str, Any], rope: Mapping[str, Any], kind: str, where: str) -> Any:
    """The fields that depend on the original and the current maximum length."""
    longest = integer(hf, "max_position_embeddings")
    if kind == "dynamic":
        return {"original_max_positions": longest}
    if kind not in ("llama3", "yarn", "longrope"):
        return {}
    # Phi-3 has this key outside the object, where it takes precedence, as in transformers.
    original = get(hf, _ORIGINAL, get(rope, _ORIGINAL, longest))
    original = integer({f"{where}.{_ORIGINAL}": original}, f"{where}.{_ORIGINAL}")
    fields: dict[str, Any] = {"original_max_positions": original}
    if kind in ("yarn", "longrope"):
        fields["factor"] = number({"factor": get(rope, "factor", longest / original)}, "factor", "")
    if kind == "yarn":
        fields["truncate"] = flag(rope, "truncate", True)
    if kind == "longrope":
        for field, key in _LISTS.items():
            values = rope.get(key)
            if not isinstance(values, list):
                raise ValueError(f"config.json: {where}.{key}={values!r}: wanted a list")
            fields[field] = tuple(number({key: value}, key, f"{where}.") for value in values)
    return fields


def write_rope_object(rope: RopeConfig) -> dict[str, Any]:
    """The object that `read_rope_object` reads, without theta."""
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for field, key in _REQUIRED.get(rope.kind, {}).items():
        scaling[key] = getattr(rope, field)
    for field, key in _OPTIONAL.get(rope.kind, {}).items():
        if getattr(rope, field) is not None:
            scaling[key] = getattr(rope, field)
    if rope.kind in ("llama3", "yarn", "longrope"):
        scaling[_ORIGINAL] = rope.original_max_positions
    if rope.kind in ("yarn", "longrope"):
        scaling["factor"] = rope.factor
    if rope.kind == "yarn":
        scaling["truncate"] = rope.truncate
    if rope.kind == "longrope":
        scaling |= {key: list(getattr(rope, field)) for field, key in _LISTS.items()}
    return scaling


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """Writes both dialects.

    transformers 5 reads `rope_parameters`. transformers 4 and most servers read the other keys, and
    without them would silently use theta = 10000.
    """
    scaling = write_rope_object(rope)
    partial = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    return {
        "rope_parameters": {"rope_theta": rope.theta, **scaling, **partial},
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        **partial,
    }


def used_rope(rope: RopeConfig) -> RopeConfig:
    """The config with the fields that its kind does not use at their defaults."""
    used = {"theta", "kind", "fraction", *_REQUIRED.get(rope.kind, ())}
    used |= set(_OPTIONAL.get(rope.kind, ()))
    if rope.kind in ("dynamic", "llama3", "yarn", "longrope"):
        used.add("original_max_positions")
    if rope.kind in ("yarn", "longrope"):
        used |= {"factor", "truncate"} if rope.kind == "yarn" else {"factor", *_LISTS}
    return RopeConfig(**{name: getattr(rope, name) for name in used})
