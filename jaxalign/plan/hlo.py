"""Parses the text of compiled programs: computations, instructions, shapes, groups, loops.

https://openxla.org/xla/operation_semantics documents the instructions.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](\{[^}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_NAME = re.compile(r"%([\w.\-]+)")
_INSTRUCTION = re.compile(r"(ROOT )?%?[\w.\-]+ = ")


class Shape(NamedTuple):
    """One array: element type, sizes, and its memory space (0: the device's main memory)."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def size(self) -> int:
        """How many elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Bytes, without padding to tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found[0]) if found else 0
        return self.size * bits / 8


class Instruction(NamedTuple):
    """One line of a computation.

    Attributes:
      name: without the percent sign.
      shapes: of the result; several for a tuple.
      opcode: e.g. "fusion".
      operands: names of instructions, in order.
      text: the text in the parentheses, for constants and parameters.
      attributes: the text after the parentheses.
    """

    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    text: str
    attributes: str

    def called(self, key: str) -> str | None:
        """The computation that an attribute names, e.g. "body"."""
        found = re.search(rf"\b{key}=%([\w.\-]+)", self.attributes)
        return None if found is None else found[1]

    def calls(self) -> list[str]:
        """Branches of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found is not None:
            return _NAME.findall(found[1])
        names = (self.called("true_computation"), self.called("false_computation"))
        return [name for name in names if name is not None]


class Computation:
    """Instructions by name, in order."""

    def __init__(self, instructions: list[Instruction], root: str):
        self.by_name = {x.name: x for x in instructions}
        self.root = self.by_name[root]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.by_name.values())

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Instruction → the instructions that read it."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.by_name}
        for instruction in self:
            for operand in instruction.operands:
                if operand in found:
                    found[operand].append(instruction)
        return found

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number → parameter."""
        return {int(x.text): x for x in self if x.opcode == "parameter"}

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """Shapes of all operands, with tuples flattened."""
        return [s for name in instruction.operands for s in self.by_name[name].shapes]


class Module(NamedTuple):
    """A program."""

    entry: str
    computations: dict[str, Computation]


def parse(text: str) -> Module:
    """Parses a compiled program from `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry = name = ""
    lines: list[Instruction] = []
    root = ""
    for line in _statements(text):
        if line.endswith("{") and "->" in line and not line.startswith("HloModule"):
            head = line.removeprefix("ENTRY ")
            name = head.split(" ", 1)[0].removeprefix("%")
            entry = name if head is not line else entry
            lines = []
        elif line == "}" and lines:
            computations[name] = Computation(lines, root or lines[-1].name)
            lines, root = [], ""
        elif " = " in line and name:
            instruction = _instruction(_COMMENT.sub("", line.removeprefix("ROOT ")))
            if instruction is not None:
                lines.append(instruction)
                root = instruction.name if line.startswith("ROOT ") else root
    if entry not in computations:
        raise ValueError(
            "the compiled program has no text that we can read; its costs cannot be counted"
        )
    return Module(entry, computations)


def _statements(text: str) -> Iterator[str]:
    """Lines; an instruction is one line, although the metadata of TPU kernels contain breaks."""
    instruction = ""
    for raw in text.splitlines():
        line = raw.strip()
        if instruction and line not in ("", "}") and not _INSTRUCTION.match(line):
            instruction += " " + line
            continue
        if instruction:
            yield instruction
        instruction = line if _INSTRUCTION.match(line) else ""
        if not instruction:
            yield line


def _instruction(line: str) -> Instruction | None:
    left, _, rest = line.partition(" = ")
    if rest.startswith("("):
        end = _closing(rest, 0) + 1
    else:
        end = rest.find(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    return Instruction(
        left.strip().removeprefix("%"),
        tuple(_shapes(kind)),
        rest[:start],
        tuple(_NAME.findall(inside)),
        inside,
        rest[stop + 1 :],
    )


def _closing(text: str, start: int) -> int:
    """The position of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return start + found.start()
    return len(text)


def _shapes(kind: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(kind):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.strip("<= ")) for d in dims.split(",") if d.strip())
        yield Shape(dtype, sizes, int(space[1]) if space else 0)


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """The participants of a collective: `[groups, members]`, device indices in mesh order.

    Raises:
      ValueError: an unknown form.
    """
    found = re.search(r"replica_groups=(\{\{.*?\}\}|\{\}|mesh\[.*?\}|\[[^ ]*)", attributes)
    if found is None or found[1] == "{}":
        return np.arange(devices)[None]
    text = found[1]
    if text.startswith("{{"):
        rows = [[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)]
        return np.array(rows)
    if text.startswith("mesh"):
        return _mesh_groups(text)
    match = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        raise ValueError(f"groups of a collective in a form that is not known: {text[:80]!r}")
    out, dims = (tuple(int(x) for x in match[i].split(",")) for i in (1, 2))
    ids = np.arange(math.prod(dims)).reshape(dims)
    if match[3]:
        ids = ids.transpose([int(x) for x in match[3].split(",")])
    return ids.reshape(out)


def _mesh_groups(text: str) -> np.ndarray:
    """Groups along named axes of a mesh: `mesh['a'=8,'b'=2] {'a'}`; `'a':(2)4` is part of an axis:
    size 4, with 2 before it."""
    axes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", text.split("]")[0])]
    wanted = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text.split("]", 1)[1])
    parts: list[int] = []
    grouped: list[int] = []
    for name, size in axes:
        chosen: list[tuple[int, int]] = []
        for other, before, own in wanted:
            if other == name:
                chosen.append((int(before or 1), int(own or size)))
        done = 1
        for before, own in sorted(chosen):
            if before > done:
                parts.append(before // done)
            grouped.append(len(parts))
            parts.append(own)
            done = before * own
        parts.append(size // done)
    ids = np.arange(math.prod(parts)).reshape(parts)
    rest = [i for i in range(len(parts)) if i not in grouped]
    members = math.prod(parts[i] for i in grouped)
    return ids.transpose(rest + grouped).reshape(-1, members)


def trip_count(module: Module, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None if that is known only at run time."""
    found = re.search(r'"?known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.attributes)
    if found is not None:
        return int(found[1])
    condition, body = loop.called("condition"), loop.called("body")
    if condition is None or body is None:
        return None
    test = module.computations[condition]
    bound = _bound(module, test)
    if bound is None:
        return None
    index, limit = bound
    step = _step(module.computations[body], index)
    return -(-limit // step)


def _bound(module: Module, test: Computation) -> tuple[int, int] | None:
    """Which element of the state is compared with which constant."""
    compare = root = test.root
    sides = [test.by_name.get(name) for name in root.operands]
    if root.opcode == "fusion":
        inner = module.computations[root.called("calls") or ""]
        compare = inner.root
        within = [inner.by_name[name] for name in compare.operands]
        sides = [sides[int(x.text)] if x.opcode == "parameter" else x for x in within]
    if compare.opcode != "compare" or "direction=LT" not in compare.attributes:
        return None
    left, right = sides
    if left is None or right is None or right.opcode != "constant":
        return None
    index = re.search(r"index=(\d+)", left.attributes)
    if left.opcode != "get-tuple-element" or index is None:
        return None
    return int(index[1]), int(right.text)


def _step(body: Computation, index: int) -> int:
    """The counter's increment per iteration; 1 if it cannot be read."""
    if body.root.opcode != "tuple" or index >= len(body.root.operands):
        return 1
    new = body.by_name[body.root.operands[index]]
    while new.opcode in ("copy", "bitcast") and new.operands:
        new = body.by_name[new.operands[0]]
    if new.opcode != "add":
        return 1
    for name in new.operands:
        operand = body.by_name[name]
        while operand.opcode in ("copy", "bitcast") and operand.operands:
            operand = body.by_name[operand.operands[0]]
        if operand.opcode == "constant":
            return max(1, int(operand.text))
    return 1
