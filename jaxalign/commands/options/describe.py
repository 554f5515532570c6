"""Describes every option, from the docstrings and defaults of the configurations' classes."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option.

    Attributes:
      name: with its sections, such as `ppo.kl_coef`.
      type: its type, such as "float or null".
      default: its default in YAML; None if the option is required.
      help: its meaning, with unit and range.
    """

    name: str
    type: str
    default: str | None
    help: str


class Section(NamedTuple):
    """The options of one section of a YAML.

    Attributes:
      name: the section's path, such as `model.lora`; "" for the top level.
      help: the first sentences of the class's docstring.
      options: in the order of the class.
    """

    name: str
    help: str
    options: tuple[Option, ...]


def sections_of(cls: type, where: str = "") -> list[Section]:
    """A configuration's sections, outermost first, each followed by its subsections.

    Args:
      cls: a dataclass; its fields that are dataclasses are sections of their own.
      where: name of its section.
    """
    found = [Section(where, summary(cls), tuple(options_of(cls, where)))]
    for name, hint in _fields(cls):
        inner = f"{where}.{name}".lstrip(".")
        for part in _dataclasses_in(hint):
            if hasattr(part, "kinds"):
                for kind, spec in part.kinds().items():
                    found += sections_of(spec, f"{inner}.{kind}")
            else:
                found += sections_of(part, inner)
    return found


def options_of(cls: type, where: str = "") -> Iterator[Option]:
    """The options of one dataclass.

    Raises:
      ValueError: one that no docstring describes.
    """
    described = attributes_of(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name, hint in _fields(cls):
        if not described.get(name):
            raise ValueError(f"{cls.__name__}.{name}: no line under Attributes in its docstring")
        full = f"{where}.{name}".lstrip(".")
        yield Option(full, _type_name(hint), _default(fields[name]), described[name])


def attributes_of(cls: type) -> dict[str, str]:
    """Field → its description in the docstring of the class or of a base class."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(vars(base).get("__doc__") or "")
        _, _, block = text.partition("Attributes:\n")
        # Two spaces, the names, a colon, the text; lines that go on are indented further.
        for names, body in re.findall(
            r"^  ((?:\w+(?:, )?)+): (.*(?:\n(?:    .*|(?=\n    )))*)", block, re.MULTILINE
        ):
            for name in names.split(", "):
                found[name] = _in_words_of_yaml(" ".join(body.split()))
    return found


def _in_words_of_yaml(text: str) -> str:
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda match: words[match[1]], text)


def summary(cls: type) -> str:
    """The docstring before its first section, on one line."""
    text = inspect.cleandoc(cls.__doc__ or "")
    text = re.split(r"^(?:Attributes|Raises):$", text, maxsplit=1, flags=re.MULTILINE)[0]
    return " ".join(text.split())


def _fields(cls: type) -> Iterator[tuple[str, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field.name, hints[field.name]


def _dataclasses_in(hint: Any) -> list[type]:
    """The dataclasses that a value of this type may be or hold."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return [hint]
    return [part for inner in typing.get_args(hint) for part in _dataclasses_in(inner)]


def _type_name(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(part) for part in inner))
    if origin in (tuple, list):
        return f"list of {_type_name(inner[0])}"
    if origin in (dict, Mapping) or hint is dict:
        return "section"
    if hint in (None, type(None)):
        return "null"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return "section"
    names = {str: "text", int: "int", float: "float", bool: "true or false"}
    return names.get(hint, str(getattr(hint, "__name__", hint)))


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default is not dataclasses.MISSING:
        return in_yaml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return in_yaml(field.default_factory())
    return None


def in_yaml(value: Any) -> str:
    """A default as one line of YAML; a section is shown as `{…}`."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if dataclasses.is_dataclass(value):
        return "{…}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {in_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(in_yaml(part) for part in value) + "]"
    if value == "":
        return '""'
    return str(value)
