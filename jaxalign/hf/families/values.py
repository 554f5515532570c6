"""Reads values of `config.json` with checks; errors name the key, its value and what is valid."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any


def unsupported(key: str, got: Any, supported: str) -> ValueError:
    """The error for a value that the decoder does not support."""
    return ValueError(f"config.json: {key}={got!r} is not supported; supported: {supported}")


def get(hf: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a key, or the default if it is absent or null."""
    value = hf.get(key)
    return default if value is None else value


def integer(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer; the key is required if there is no default."""
    value = get(hf, key, default)
    if value is None:
        raise ValueError(f"config.json: {key} is missing; it must be a positive integer")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {key}={value!r}: wanted a positive integer")
    return value


def number(values: Mapping[str, Any], key: str, where: str) -> float:
    """A positive number; `where` is the prefix of the key in messages, e.g. "rope."."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"config.json: {where}{key}={value!r}: wanted a positive number")
    return float(value)


def optional(hf: Mapping[str, Any], key: str) -> float | None:
    """A positive number, or None if the key is absent or null."""
    return None if hf.get(key) is None else number(hf, key, "")


def flag(hf: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false."""
    value = get(hf, key, default)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: {key}={value!r}: wanted true or false")
    return value


def refuse(hf: Mapping[str, Any], key: str, supported: str, *, harmless: Collection[Any]) -> None:
    """Refuses a feature that the decoder lacks; absent, null and `harmless` values pass."""
    if hf.get(key) is not None and hf[key] not in harmless:
        raise unsupported(key, hf[key], supported)
