"""The cost of a compiled program to one device: FLOPs, memory traffic, network traffic.

The costs are read from the compiled text, with loop bodies multiplied by their trip counts. XLA's
own `cost_analysis` counts a loop body once and does not support GPUs.

- FLOPs are those of matrix products (and attention kernels): 2 per multiply-add.
- Bytes are those that each fused kernel reads from and writes to the device's main memory, as if no
  cache kept data between kernels; of an array that a kernel slices, only the slice counts.
- A collective's bytes are what one device sends under the bandwidth-optimal algorithm (ring within
  a node or slice, then between them). n bytes on each of g devices: all-gather n·(g − 1),
  reduce-scatter and all-to-all n·(g − 1)/g, all-reduce twice that, permute n. An all-reduce that is
  fused with slicing its sum (TPU) counts as a reduce-scatter.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import numpy as np

from jaxalign.plan.hlo import (
    Computation,
    Instruction,
    Module,
    Shape,
    parse,
    replica_groups,
    trip_count,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_FREE = frozenset(
    {
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all",
        "partition-id", "replica-id", "opt-barrier", "add-dependency", "iota",
    }
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes that one device sends in collectives of one kind.

    Attributes:
      count: how many run.
      inner: bytes within a node or slice (NVLink, ICI).
      outer: bytes between nodes or slices (InfiniBand, DCN).
    """

    count: float = 0.0
    inner: float = 0.0
    outer: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.count + other.count, self.inner + other.inner, self.outer + other.outer)

    def __mul__(self, times: float) -> Traffic:
        return Traffic(self.count * times, self.inner * times, self.outer * times)


@dataclasses.dataclass(frozen=True)
class Costs:
    """The costs to one device.

    Attributes:
      flops: FLOPs of matrix products.
      bytes: bytes to and from its main memory.
      collectives: kind → the bytes it sends.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, Traffic] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Costs) -> Costs:
        kinds = {*self.collectives, *other.collectives}
        joined = {
            k: self.collectives.get(k, Traffic()) + other.collectives.get(k, Traffic())
            for k in sorted(kinds)
        }
        return Costs(self.flops + other.flops, self.bytes + other.bytes, joined)

    def __mul__(self, times: float) -> Costs:
        scaled = {kind: traffic * times for kind, traffic in self.collectives.items()}
        return Costs(self.flops * times, self.bytes * times, scaled)

    @property
    def inner(self) -> float:
        """Bytes sent within a node or slice."""
        return sum(traffic.inner for traffic in self.collectives.values())

    @property
    def outer(self) -> float:
        """Bytes sent between nodes or slices."""
        return sum(traffic.outer for traffic in self.collectives.values())


def count_costs(text: str, nodes: Sequence[int], trips: int = 1) -> Costs:
    """Costs of a compiled program.

    Args:
      text: the program, `compiled.as_text()`.
      nodes: the node or slice of each device, in mesh order.
      trips: the maximum trip counts of loops whose count is known only at run time (the decode
        loop, and the vocabulary head's loop over trained positions).
    """
    counter = _Counter(parse(text), np.asarray(nodes), trips)
    return counter.costs(counter.module.entry)


class _Counter:
    """Walks a program: counts every computation once and multiplies at its calls."""

    def __init__(self, module: Module, nodes: np.ndarray, trips: int):
        self.module, self.nodes, self.trips = module, nodes, trips
        self._known: dict[str, Costs] = {}

    def costs(self, name: str) -> Costs:
        if name not in self._known:
            total = Costs()
            computation = self.module.computations[name]
            for instruction in computation:
                total += self._one(computation, instruction)
            self._known[name] = total
        return self._known[name]

    def _one(self, where: Computation, x: Instruction) -> Costs:
        kind = x.opcode.removesuffix("-start")
        if x.opcode in _FREE or x.opcode.endswith(("-done", "-update")):
            return Costs()
        if x.opcode == "while":
            body = self.costs(x.called("body") or "")
            turns = trip_count(self.module, x)
            if turns is None:
                turns = self.trips if body.flops else 1
            return body * turns
        if kind in COLLECTIVES:
            if "chain_id=" in x.attributes and not _starts_collective(where):
                return Costs()  # a TPU spreads one collective over several kernels
            return Costs(0.0, _touched(where, x), {kind: self._traffic(kind, where, x)})
        if x.opcode == "conditional":
            branches = [self.costs(name) for name in x.calls()]
            return max(branches, key=lambda c: (c.flops, c.bytes), default=Costs())
        if x.opcode in ("call", "async-start"):
            return self.costs(x.called("to_apply") or x.called("calls") or "")
        if x.opcode == "fusion":
            inner = self.costs(x.called("calls") or "")
            called = self.module.computations[x.called("calls") or ""]
            sent = inner.collectives
            if "all-reduce" in sent and _keeps_a_part(called):
                both = sent["all-reduce"]
                sent = {"reduce-scatter": Traffic(both.count, both.inner / 2, both.outer / 2)}
            return Costs(inner.flops, _fused_bytes(self.module, where, x, called), sent)
        flops = 0.0
        if x.opcode == "dot":
            flops = _dot_flops(where, x)
        elif x.opcode == "convolution":
            flops = _convolution_flops(where, x)
        elif x.opcode == "custom-call":
            flops = _kernel_flops(where, x)
        return Costs(flops, _touched(where, x))

    def _traffic(self, kind: str, where: Computation, x: Instruction) -> Traffic:
        size = sum(shape.bytes for shape in where.operand_shapes(x))
        if kind == "collective-permute":
            found = re.search(r"source_target_pairs=\{(.*?)\}\}", x.attributes)
            pairs = np.array(re.findall(r"(\d+),(\d+)", found[1] if found else ""), int)
            if not len(pairs):
                return Traffic()
            source, target = pairs.T
            moved = source != target
            far = self.nodes[source] != self.nodes[target]
            devices = len(self.nodes)
            outer = size * float(np.sum(far)) / devices
            return Traffic(1.0, size * float(np.sum(moved)) / devices - outer, outer)
        groups = replica_groups(x.attributes, len(self.nodes))
        members = groups.shape[1]
        between = len(set(self.nodes[groups[0]].tolist()))
        within = members / between
        if kind in ("all-gather", "collective-broadcast"):
            whole = size * members if kind == "all-gather" else size
            outer = whole / members * (between - 1)
            inner = whole * (members - 1) / members - outer
        elif kind in ("all-to-all", "ragged-all-to-all"):
            outer = size * (members - within) / members
            inner = size * (within - 1) / members
        else:
            twice = 2 if kind == "all-reduce" else 1
            inner = twice * size * (within - 1) / within
            outer = twice * size / within * (between - 1) / between
        return Traffic(1.0, inner, outer)


def _starts_collective(where: Computation) -> bool:
    return any("AsyncCollectiveStart" in x.attributes for x in where)


def _keeps_a_part(called: Computation) -> bool:
    """Whether a fused kernel sums and keeps only a slice: a TPU's form of reduce-scatter."""
    made = [called.root]
    if called.root.opcode == "tuple":
        made = [called.by_name[name] for name in called.root.operands]
    return all(_through(called, x).opcode == "dynamic-slice" for x in made)


def _main(shapes: Sequence[Shape]) -> float:
    """Bytes of the shapes in the device's main memory."""
    return sum(shape.bytes for shape in shapes if shape.space == 0)


def _touched(where: Computation, x: Instruction) -> float:
    """Bytes that a single instruction reads and writes."""
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(x.shapes)
    if x.opcode == "dynamic-update-slice":
        return 2 * _main(where.by_name[x.operands[1]].shapes)
    if x.opcode.endswith("-start"):
        # The result of a started copy or collective lists its inputs beside its outputs.
        return _main(x.shapes)
    known = [name for name in x.operands if name in where.by_name]
    return _main(x.shapes) + sum(_main(where.by_name[name].shapes) for name in known)


def _fused_bytes(module: Module, where: Computation, x: Instruction, called: Computation) -> float:
    """Bytes that a fused kernel reads and writes: slices of what it slices, updates of what it
    updates in place."""
    total = 0.0
    for number, name in enumerate(x.operands):
        shapes = where.by_name[name].shapes
        if number not in called.parameters or not shapes or shapes[0].space:
            continue
        total += min(_read(module, called, called.parameters[number]), _main(shapes))
    roots = [called.root]
    if called.root.opcode == "tuple":
        roots = [called.by_name[name] for name in called.root.operands]
    for root, shape in zip(roots, x.shapes, strict=False):
        if shape.space:
            continue
        made = _through(called, root)
        if made.opcode == "dynamic-update-slice":
            total += _main(called.by_name[made.operands[1]].shapes)
        else:
            total += shape.bytes
    return total


def _through(called: Computation, x: Instruction) -> Instruction:
    while x.opcode in ("bitcast", "copy", "convert") and x.operands:
        x = called.by_name[x.operands[0]]
    return x


def _read(module: Module, called: Computation, x: Instruction) -> float:
    """Bytes of an operand that the kernel reads."""
    total = 0.0
    for user in called.users[x.name]:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == x.name:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == x.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(module, called, user)
        elif user.opcode == "fusion":  # a kernel within the kernel
            within = module.computations[user.called("calls") or ""]
            places = [i for i, name in enumerate(user.operands) if name == x.name]
            total += sum(_read(module, within, within.parameters[i]) for i in places)
        else:
            return math.inf
    return total


def _numbers(text: str, key: str) -> list[int]:
    found = re.search(rf'"?{key}"?[=:]\s*[\{{\[]([^\}}\]]*)[\}}\]]', text)
    return [int(x) for x in re.findall(r"\d+", found[1])] if found else []


def _dot_flops(where: Computation, x: Instruction) -> float:
    left = where.by_name[x.operands[0]].shapes[0]
    inner = math.prod(left.dims[i] for i in _numbers(x.attributes, "lhs_contracting_dims"))
    return 2.0 * x.shapes[0].size * inner


def _convolution_flops(where: Computation, x: Instruction) -> float:
    """Products that meet no padding and no hole: the TPU compiler writes batched matrix products
    as convolutions with both."""
    left, right = (where.by_name[name].shapes[0] for name in x.operands[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    if labels is None:
        return 0.0
    data, kernel, out = labels[1], labels[2], labels[3]
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    options = dict(re.findall(r"(\w+)=([\w\-]+)", window[1])) if window else {}

    def option(key: str, axis: int, default: int) -> int:
        return int(options[key].split("x")[axis]) if key in options else default

    pairs = 1
    for axis in range(sum(c.isdigit() for c in data)):
        size = right.dims[kernel.index(str(axis))]
        pad = int(options["pad"].split("x")[axis].split("_")[0]) if "pad" in options else 0
        hole = option("lhs_dilate", axis, 1)
        first = np.arange(x.shapes[0].dims[out.index(str(axis))]) * option("stride", axis, 1) - pad
        place = first[:, None] + np.arange(size)[None] * option("rhs_dilate", axis, 1)
        end = (left.dims[data.index(str(axis))] - 1) * hole + 1
        pairs *= int(np.sum((place >= 0) & (place < end) & (place % hole == 0)))
    batch = x.shapes[0].dims[out.index("b")]
    made = x.shapes[0].dims[out.index("f")]
    return 2.0 * batch * made * right.dims[kernel.index("i")] * pairs


def _kernel_flops(where: Computation, x: Instruction) -> float:
    """FLOPs of a kernel that is opaque to the compiler."""
    target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
    name = target[1] if target else ""
    shapes = where.operand_shapes(x)
    if "gemm" in name or "matmul" in name:
        inner = _numbers(x.attributes, "lhs_contracting_dimensions")
        return 2.0 * x.shapes[0].size * math.prod(shapes[0].dims[i] for i in inner)
    return attention_flops(name, x.attributes, shapes)


def attention_flops(target: str, attributes: str, shapes: Sequence[Shape]) -> float:
    """FLOPs of an attention kernel for half of all pairs of tokens, as a causal mask leaves.

    cuDNN (keys `[B, S, K, d]`): 2 products forward, 5 backward. Splash (keys `[…, K, S, d]`) and
    our Pallas kernels (keys `[B, S, K, d]`): 2 forward, 3 for the queries' gradient, 4 for that of
    keys and values.
    """
    wide = [x for x in shapes if len(x.dims) >= 3 and x.dtype in ("bf16", "f16", "f32")]
    if len(wide) < 3:
        return 0.0
    if "fmha" in target:
        products, seen = 5 if "ackward" in target else 2, wide[1].dims[1]
    elif "tpu" in target and (kernel := re.search(r"splash_m[hq]a_(fwd|dq|dkv)", attributes)):
        products = {"fwd": 2, "dq": 3, "dkv": 4}[kernel[1]]
        seen = wide[1].dims[-2]
    elif "triton" in target and (kernel := re.search(r"flash_(forward|to_\w+)", attributes)):
        products = {"forward": 2, "to_queries": 3}.get(kernel[1], 4)
        seen = wide[1].dims[1]
    else:
        return 0.0
    return 2.0 * products * wide[0].size * seen / 2
