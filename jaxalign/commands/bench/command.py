"""The cases that `jaxalign bench` measures by default."""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxalign.commands.bench import run_cases, show
from jaxalign.commands.bench.case import ROWS, Case, layouts_of, make_case, measurable


def bench(
    what: Sequence[str] | None,
    sizes: Sequence[str],
    layouts: Sequence[str],
    options: dict[str, Any],
    out: str | None,
) -> list[dict[str, Any]]:
    """Runs the requested measurements, prints a table, and appends JSON lines to a file.

    Args:
      what, sizes, layouts: see `Case`; combinations that do not exist are left out, with a message.
        None: all.
      options: other options of `Case`; None: the case's default.
      out: file to append records to; None: none.

    Raises:
      ValueError: an unknown value, or no case left.
    """
    cases: list[Case] = []
    for size in sizes:
        for one in measurable() if what is None else what:
            for layout in layouts:
                if layout in ROWS and layout not in layouts_of(one):
                    print(f"bench: {one} has no {layout} rows: left out", file=sys.stderr)
                    continue
                cases.append(make_case(one, size, layout, options))
    if not cases:
        raise ValueError("bench: nothing to measure; wanted generate with --layouts full or padded")

    def tell(record: dict[str, Any]) -> None:
        case = record["case"]
        state = record.get("error", "done")
        print(f"bench: {case['what']} {case['size']} {case['layout']}: {state}", file=sys.stderr)
        write(record, out)

    records = run_cases(cases, tell)
    print(show(records))
    return records


def write(record: dict[str, Any], out: str | None) -> None:
    """Adds a record to a file of JSON lines."""
    if out is not None:
        with pathlib.Path(out).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
