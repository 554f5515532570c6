"""Self-contained HTML pages: frame, style, script and tables. `charts` has the charts.

Light or dark follows the reader's setting. A page with a script allows style and script only by
their hashes (CSP), so that text from a run's data cannot run or load anything.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxalign.commands.report.axes import text
from jaxalign.data.paths import replace_text

_HERE = pathlib.Path(__file__).parent
_SEARCHED = 2000  # the mark is in the head


def page(
    title: str, body: Sequence[str], style: str = "", kind: str = "", script: bool = False
) -> str:
    """Assembles a page from HTML parts under a title; well-formed as HTML and as XML.

    Args:
      title: of the page.
      body: its parts.
      style: further rules, which must not need escaping.
      kind: the command that makes it, which `write_page` looks for.
      script: whether it has the script of the charts.
    """
    name = text(title)
    rules = _asset("page.css") + style
    code = _asset("page.js") if script else ""
    head = (
        f'<meta charset="utf-8"/><meta name="viewport" content="width=device-width"/>'
        f"{_mark(kind)}{_policy(rules, code) if script else ''}"
        f"<title>{name} – jaxalign</title><style>{rules}</style>"
    )
    inner = "\n".join([f"<main><h1>{name}</h1>", *body, "</main>"])
    end = f"<script>{code}</script>" if script else ""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{inner}\n{end}'
        "</body></html>\n"
    )


def write_page(path: pathlib.Path, made: str, kind: str, overwrite: bool = False) -> pathlib.Path:
    """Writes a page atomically; may replace an earlier page of the same command.

    Args:
      path: HTML file; its folder is made.
      made: the page.
      kind: the command that made it.
      overwrite: replace any other file, too.

    Raises:
      ValueError: the file is there, and is not a page of this command.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder; give a file with --out, such as {path / 'report.html'}"
        )
    if not overwrite and path.exists() and not _is_page(path, kind):
        raise ValueError(
            f"{path} is there already and is no page of `jaxalign {kind}`: it stays as it is. Give "
            "another file with --out, remove it first, or replace it with --overwrite"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, made)
    return path


def _policy(rules: str, code: str) -> str:
    """The content security policy, which allows only this style and this script."""
    policy = (
        f"default-src 'none'; style-src {_hash(rules)}; script-src {_hash(code)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return f'<meta http-equiv="Content-Security-Policy" content="{text(policy)}"/>'


def _mark(kind: str) -> str:
    return f'<meta name="generator" content="jaxalign {text(kind)}"/>' if kind else ""


def _is_page(path: pathlib.Path, kind: str) -> bool:
    with path.open("rb") as file:
        return _mark(kind).encode() in file.read(_SEARCHED)


@functools.cache
def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[Any]],
    numbers: Sequence[int] = (),
    kind: str = "",
    marks: Sequence[str] = (),
    head_marks: Sequence[str] = (),
) -> str:
    """A table.

    Args:
      heads: of the columns.
      rows: cells, in the order of the columns.
      numbers: which columns hold numbers.
      kind: the class of all other cells.
      marks: ready HTML before the first cell of each row.
      head_marks: the same before each head.
    """

    def cell(tag: str, i: int, value: Any, mark: str = "") -> str:
        name = "n" if i in numbers else kind
        attribute = f' class="{name}"' if name else ""
        return f"<{tag}{attribute}>{mark}{text(value)}</{tag}>"

    before = list(head_marks) or [""] * len(heads)
    first = "".join(cell("th", i, *pair) for i, pair in enumerate(zip(heads, before, strict=True)))
    lines = [f"<tr>{first}</tr>"]
    for row, mark in zip(rows, list(marks) or [""] * len(rows), strict=True):
        cells = (cell("td", i, value, "" if i else mark) for i, value in enumerate(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"


def scrolling(inner: str, label: str) -> str:
    """A table that scrolls sideways on narrow screens, also by keyboard."""
    return f'<div class="wide" tabindex="0" role="region" aria-label="{text(label)}">{inner}</div>'
