"""YAML with limits on size, nodes, depth, aliases and numbers, and with our own errors only.

A few hundred bytes of YAML with aliases of aliases can expand to billions of values. Here an alias
counts as many nodes as it expands to, and an alias to a value that contains it is an error.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import yaml

from jaxalign.data.bounds import MAX_DIGITS, check_plain

MAX_BYTES = 2**20
"""The maximum bytes of a YAML file."""
MAX_NODES = 100_000
"""The maximum number of keys and values in a YAML text, with aliases expanded."""
MAX_DEPTH = 50
"""The maximum nesting depth."""

_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MAX_BITS = 1000  # a float holds numbers below 2¹⁰²⁴


def load_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
      text: of at most one document.
      where: what it is, for the message: "config runs/a.yaml".

    Raises:
      ValueError: broken YAML, or a limit is exceeded; the message has the line and column.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: {error}") from error
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{where}: a value cannot be read ({error}); correct it") from error


def load_yaml_file(path: pathlib.Path) -> Any:
    """The value of a YAML file.

    Raises:
      ValueError: not a plain file, larger than `MAX_BYTES`, not UTF-8, or as `load_yaml`.
    """
    check_plain(path)
    raw = path.read_bytes()
    if len(raw) > MAX_BYTES:
        raise ValueError(
            f"config {path}: {len(raw):,} bytes, wanted at most {MAX_BYTES:,}; is this a "
            "configuration?"
        )
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"config {path}:{line}: invalid UTF-8 (byte {raw[error.start]:#04x}); save the file as "
            "UTF-8"
        ) from error
    return load_yaml(text, f"config {path}")


class Loader(yaml.SafeLoader):
    """Safe, limited YAML in which 1e-5 is a number and a duplicate key is an error."""

    def __init__(self, stream: Any):
        super().__init__(stream)
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}  # id of a finished node → its nodes

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the text, counted."""
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        before = self._nodes
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        size = self._sizes.get(id(node)) if alias else 1
        if size is None:
            raise _refused("an alias stands for a value that holds it", mark)
        self._nodes += size
        if self._nodes > MAX_NODES:
            raise _refused(f"more than {MAX_NODES} values, with those of aliases", mark)
        if not alias:
            self._sizes[id(node)] = self._nodes - before
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node; any error of PyYAML becomes an error with line and column."""
        number = node.tag in _NUMBERS and isinstance(node, yaml.ScalarNode)
        if number and len(node.value) > MAX_DIGITS:
            raise _refused(f"a number of more than {MAX_DIGITS} digits", node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            kind = str(node.tag).rpartition(":")[2][:40]
            got = repr(node.value)[:40] if isinstance(node, yaml.ScalarNode) else f"a {node.id}"
            raise _refused(f"{got} is no {kind}", node.start_mark) from error
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise _refused("a number beyond what a float holds", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The section of a node; its keys must be distinct scalars."""
        if not isinstance(node, yaml.MappingNode):
            raise _refused(f"a {node.id} is no section", node.start_mark)
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _refused(f"a key is a {key_node.id}, wanted a name", key_node.start_mark)
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise _refused(f"the key {repr(key)[:60]} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refused(what: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, f"{what}; correct it", mark)


EXPONENT = ("tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"))
"""The resolver for 1e-5, which would be a string because YAML 1.1 requires a dot in a float."""

Loader.add_implicit_resolver(*EXPONENT, list("-+0123456789"))
