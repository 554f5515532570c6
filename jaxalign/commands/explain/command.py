"""The command `explain`: its arguments, the page, the JSON file and the terminal."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

from jaxalign.commands.command import Command
from jaxalign.commands.going_on import overwrite_argument


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", help="a run's folder; nothing in it is changed")
    parser.add_argument("--step", type=int, required=True, help="which step, from 1")
    parser.add_argument(
        "--rows", type=int, default=8, metavar="N", help="rows to show with their text; default 8"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="HTML file to write, with a JSON file beside it; RUN-step-N.html here by default",
    )
    overwrite_argument(parser, "the page")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="explain although data, models or the template are others than the run's",
    )


def _explain(parsed: argparse.Namespace) -> None:
    from jaxalign.data.paths import check_free, local_path, replace_text

    if parsed.rows < 0:
        raise ValueError(f"--rows={parsed.rows}: wanted 0 or more")
    run = local_path(parsed.folder, "folder").resolve().name
    out = parsed.out or f"{run}-step-{parsed.step}.html"
    page = check_free(out, "--out", overwrite=parsed.overwrite)
    if page.suffix not in (".html", ".htm"):
        raise ValueError(f"--out={out!r}: wanted a name that ends with .html")
    values = check_free(page.with_suffix(".json"), "--out", overwrite=parsed.overwrite)

    from jaxalign.commands.explain.explain import as_values, explain
    from jaxalign.commands.explain.page import make_page
    from jaxalign.commands.explain.show import show

    found = explain(
        parsed.folder, parsed.step, show=parsed.rows, allow_changes=parsed.allow_changes
    )
    page.parent.mkdir(parents=True, exist_ok=True)
    replace_text(page, make_page(found))
    text = json.dumps(as_values(found), indent=1, ensure_ascii=False, allow_nan=False)
    replace_text(pathlib.Path(values), text + "\n")
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(f"{show(found, colour)}\n{page}\n{values}")


COMMAND = Command(
    "explain",
    "which rows and tokens made a step of a run what it was",
    _arguments,
    _explain,
    compiles=True,
)
