"""Prints records as a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_HEAD = (
    "what", "size", "rows", "tokens/s", "GFLOP/s", "of limit", "peak MiB", "compile s", "compiles",
    "data s", "a step",
)  # fmt: skip


def show(records: Sequence[dict[str, Any]]) -> str:
    """One line per record, then its programs' choices; a failed record shows its error."""
    lines = [_HEAD, *(_line(record) for record in records if "error" not in record)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    lines = [
        "  ".join(text.rjust(w) for text, w in zip(line, widths, strict=True)) for line in lines
    ]
    for record in records:
        case = record["case"]
        name = f"{case['what']} {case['size']} {case['layout']}"
        if "error" in record:
            lines.append(f"{name}: {record['error']}")
        elif record.get("choices"):
            lines.append(f"{name}: {'; '.join(record['choices'])}")
    return "\n".join(lines)


def _line(record: dict[str, Any]) -> tuple[str, ...]:
    case = record["case"]
    parts = {k: v for k, v in record["parts"].items() if k not in ("data", "update")}
    parts |= {"update": record["parts"]["update"]} if parts and "update" in record["parts"] else {}
    step = f"{record['step_seconds']:.3g} s"
    if parts:
        step += " (" + ", ".join(f"{name} {value:.3g}" for name, value in parts.items()) + ")"
    return (
        case["what"],
        case["size"],
        case["layout"],
        f"{record['tokens_per_second']:,.0f}",
        f"{record['model_flops_per_second'] / 1e9:,.1f}",
        f"{100 * record['fraction_of_limit']:.1f} %",
        f"{record['peak_bytes'] / 2**20:,.0f}",
        f"{record['compile_seconds']:.1f}",
        f"{record['compiles']}+{record['recompiles']}",
        f"{record['parts'].get('data', 0.0):.4f}",
        step,
    )
