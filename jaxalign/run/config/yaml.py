"""YAML and `key=value` overrides → frozen dataclasses, with every problem in one error.

A key that is not a field of the dataclass is an error that names the nearest field. Nothing else in
the package reads YAML.
"""

from __future__ import annotations

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml

from jaxalign.run.config import nearest
from jaxalign.run.config.recipes import find_config
from jaxalign.run.config.yaml_loader import EXPONENT, load_yaml, load_yaml_file

T = TypeVar("T")


def read_yaml(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a YAML file that holds a mapping.

    Args:
      path: a file, or `recipe:NAME`, see `jaxalign.run.config.recipes`.

    Raises:
      ValueError: no such file or recipe, not UTF-8, broken YAML (with the line) or YAML beyond the
        limits of `jaxalign.run.config.yaml_loader`, or not a mapping.
    """
    path = find_config(path)
    loaded = load_yaml_file(path)
    if loaded is None:
        raise ValueError(f"config {path}: the file is empty; wanted 'key: value' lines")
    if not isinstance(loaded, dict):
        got = {"list": "a list", "str": "text"}.get(type(loaded).__name__, repr(loaded))
        raise ValueError(f"config {path}: wanted 'key: value' lines, got {got}")
    return loaded


class _Dumper(yaml.SafeDumper):
    """Writes YAML for `Loader`: quotes a text that would be read as a number."""


_Dumper.add_implicit_resolver(*EXPONENT, list("-+0123456789"))


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Applies `a.b=value` assignments, whose values are YAML, to nested values.

    Raises:
      ValueError: not of the form `key=value`, or a key inside a value that is not a section.
    """
    result = _copy(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ValueError(f"override {assignment!r}: wanted key=value, e.g. data.rows=8")
        node = result
        *parents, leaf = key.split(".")
        for parent in parents:
            child = node.setdefault(parent, {})
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ValueError(f"override {assignment!r}: {parent!r} is no section")
            node = child
        node[leaf] = load_yaml(text, f"override {assignment[:200]!r}")
    return result


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values, overridden by those of `over`."""
    result = _copy(base)
    for key, value in over.items():
        inner = result.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            result[key] = merge(inner, value)
        else:
            result[key] = _copy(value) if isinstance(value, Mapping) else value
    return result


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


class _Problems(list[str]):
    """What is wrong with the values of a configuration of class `root`."""

    def __init__(self, root: Any):
        super().__init__()
        self.root = root


def build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Nested values → a dataclass, with every problem collected into one error."""
    problems = _Problems(cls)
    built = _build(cls, values, "", problems)
    if problems:
        raise ValueError("config:\n  " + "\n  ".join(problems))
    return built


def to_values(config: Any) -> Any:
    """A dataclass → plain nested values for YAML."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_values(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {name: to_values(value) for name, value in config.items()}
    return [to_values(v) for v in config] if isinstance(config, (tuple, list)) else config


def yaml_text(config: Any) -> str:
    """A resolved configuration as YAML."""
    return yaml.dump(to_values(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_yaml(path: str | pathlib.Path, config: Any) -> None:
    """Writes a resolved configuration."""
    pathlib.Path(path).write_text(yaml_text(config), encoding="utf-8")


def _build(cls: Any, values: Any, where: str, problems: _Problems) -> Any:
    if not isinstance(values, Mapping):
        problems.append(f"{where.rstrip('.') or 'top level'}: wanted a section, got {values!r}")
        return None
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    before = len(problems)
    arguments = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in fields:
            hint = nearest.hint(str(key), where, fields, problems.root)
            problems.append(f"{name}: unknown key; {hint}")
            continue
        arguments[key] = _convert(hints[key], value, name, problems)
    for key, field in fields.items():
        required = field.default is dataclasses.MISSING and (
            field.default_factory is dataclasses.MISSING
        )
        # An option with an alternative is required unless the alternative is given.
        unless = field.metadata.get("unless")
        required |= unless is not None and unless not in values
        if required and key not in values:
            problems.append(f"{where}{key}: missing")
    if len(problems) > before:
        return None
    try:
        return cls(**arguments)
    except ValueError as error:
        problems.append(f"{where.rstrip('.') or cls.__name__}: {error}")
        return None


def _convert(hint: Any, value: Any, name: str, problems: _Problems) -> Any:
    """Converts one value to the annotated type, or records a problem."""
    if hint is Any:
        return value
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [h for h in typing.get_args(hint) if h is not type(None)]
        if value is None and len(options) < len(typing.get_args(hint)):
            return None
        fitting = [h for h in options if _fits(h, value)]
        count = len(problems)
        converted = _convert((fitting or options)[0], value, name, problems)
        if len(problems) == count + 1 and value in ("None", "none", "NULL"):
            problems[-1] += "; write null for none"
        return converted
    if hasattr(hint, "kinds") and isinstance(value, Mapping):  # a table of classes by `kind`
        kind, known = value.get("kind"), hint.kinds()
        if not isinstance(kind, str) or kind not in known:
            problems.append(f"{name}.kind: wanted one of {', '.join(known)}, got {kind!r}")
            return None
        return _build(known[kind], value, f"{name}.", problems)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, f"{name}.", problems)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
        inner = typing.get_args(hint)[0]
        return tuple(
            _convert(inner, item, f"{name}[{i}]", problems) for i, item in enumerate(items)
        )
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            problems.append(f"{name}: wanted a section, got {value!r}")
            return value
        inner = typing.get_args(hint)[1]
        return {str(k): _convert(inner, v, f"{name}.{k}", problems) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is str and isinstance(value, pathlib.Path):
        return str(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        problems.append(f"{name}: wanted {hint.__name__}, got {value!r}{_unquoted(hint, value)}")
    return value


def _unquoted(hint: Any, value: Any) -> str:
    """A remedy for a number or boolean that was written as text."""
    if not isinstance(value, str):
        return ""
    try:
        plain = load_yaml(value, "a value")
    except ValueError:
        return ""
    fits = isinstance(plain, hint) or (hint is float and isinstance(plain, int))
    return "; write it without quotes" if fits and not isinstance(plain, str) else ""


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value has one of several types that an option accepts."""
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple))
    return isinstance(hint, type) and isinstance(value, hint)
