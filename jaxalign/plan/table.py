"""Prints a plan as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxalign.parallel.chips import GIB


def show(plan: Any, kinds: Sequence[str]) -> str:
    """The table: memory by kind, programs, collectives, speed, assumptions."""
    mesh = " × ".join(f"{name}={size}" for name, size in plan.mesh.items())
    rolls_out = any(program.name == "decode" for program in plan.programs)
    what = "iteration" if rolls_out else "step"
    lines = [f"{plan.algorithm} {what} on {plan.devices}, mesh {mesh}; on each device:"]
    lines += [f"  {kind:<10} {human(getattr(plan, kind)):>12}" for kind in kinds]
    lines.append(f"  {'total':<10} {human(plan.total):>12}   while “{plan.peak}” runs")
    lines.append(f"  {'capacity':<10} {_capacity(plan)}")
    if plan.host:
        lines.append(f"  {'on host':<10} {human(plan.host):>12}")
    lines += ["", *_programs(plan)]
    if plan.head_chunk is not None:
        lines.append(f"  the vocabulary head reads {plan.head_chunk:,} positions at a time")
    lines += ["", *_collectives(plan)]
    if plan.speed is not None:
        speed = plan.speed
        each = ", ".join(f"{name} {t:.3g} s" for name, t in speed.by_resource.items())
        lines += [
            "",
            f"at best {speed.seconds:.3g} s a {what} (bound by {speed.bound}; {each}; "
            f"{speed.seconds_serial:.3g} s if nothing overlapped): "
            f"{speed.tokens_per_second:,.0f} tokens/s, MFU {100 * speed.mfu:.0f} %",
            f"assumed: {speed.assumptions}",
        ]
    lines += _decode(plan.decode)
    saved = plan.checkpoint
    of = f"{saved.hosts} host" + ("s" if saved.hosts > 1 else "")
    lines.append(
        f"a checkpoint: {human(saved.bytes)}, {saved.seconds:.3g} s to write and as much to "
        f"restore at {saved.bandwidth / 1e9:g} GB/s of each of {of} (--storage-gbps)"
    )
    lines += [f"note: {note}" for note in plan.notes]
    lines.append(f"compiled in {plan.compile_seconds:.1f} s")
    return "\n".join(lines)


def _capacity(plan: Any) -> str:
    if plan.capacity is None:
        return f"{'unknown':>12}"
    spare = plan.capacity - plan.total
    verdict = (
        f"fits, {human(spare)} to spare" if plan.fits else f"DOES NOT FIT, {human(-spare)} over"
    )
    return f"{human(plan.capacity):>12}   {verdict}"


def _programs(plan: Any) -> list[str]:
    resident = plan.params + plan.frozen + plan.optimizer + plan.models
    heads = ("program", "times", "memory", "TFLOP", "GB moved", "compiled")
    lines: list[str] = ["  {:<12} {:>5} {:>11} {:>10} {:>10} {:>9}".format(*heads)]
    for one in plan.programs:
        lines.append(
            f"  {one.name:<12} {one.times:>5} {human(resident + one.extra):>11} "
            f"{one.costs.flops / 1e12:>10.3f} {one.costs.bytes / 1e9:>10.2f} {one.seconds:>7.1f} s"
        )
    return lines


def _decode(steps: Sequence[Any]) -> list[str]:
    """The best possible decoding speeds."""
    if not steps:
        return []
    heads = ("decoding", "ms a step", "MB a token", "tokens/s")
    lines = ["", "  {:<12} {:>10} {:>11} {:>10}  at best, weights split over all".format(*heads)]
    for step in steps:
        verdict = f"bound by {step.bound}" + ("" if step.fits else "; DOES NOT FIT")
        lines.append(
            f"  {step.slots:>6} slots {1e3 * step.seconds:>10.2f} "
            f"{step.bytes_per_token / 1e6:>11.1f} {step.tokens_per_second:>10,.0f}  {verdict}"
        )
    return [*lines, ""]


def _collectives(plan: Any) -> list[str]:
    if not plan.costs.collectives:
        return ["  no collectives"]
    inner = "NVLink" if "NVIDIA" in plan.devices else "ICI" if "TPU" in plan.devices else "inner"
    lines = [f"  {'sent in':<20} {'runs':>8} {'GB ' + inner:>12} {'GB network':>12}"]
    for kind, traffic in plan.costs.collectives.items():
        lines.append(
            f"  {kind:<20} {traffic.count:>8.0f} {traffic.inner / 1e9:>12.3f} "
            f"{traffic.outer / 1e9:>12.3f}"
        )
    return lines


def human(size: float) -> str:
    """Bytes in a suitable unit."""
    if size >= GIB:
        return f"{size / GIB:.2f} GiB"
    for unit in ("B", "KiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} MiB"
