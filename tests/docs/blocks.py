"""The fenced blocks of README.md, CONTRIBUTING.md and docs/*.md.

The Chinese pages hold the same commands (test_chinese.py) and are not run again.

A comment on the line before a fence says how its test differs from that of other blocks:

    <!-- test: slow -->                          runs with -m slow only
    <!-- test: skip needs a Cloud project -->    is not run, for that reason
"""

import pathlib
import re
import textwrap
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(
    r"^(?: *<!-- test: (?P<mark>\w+)(?: (?P<reason>[^\n]+?))? -->\n)?"
    r"(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A fenced block: `name` is `page:line`, `mark` is "", "slow" or "skip"."""

    name: str
    language: str
    code: str
    mark: str
    reason: str


def blocks_of(path):
    """The blocks of a page, in order."""
    text = path.read_text("utf-8")
    page = path.relative_to(ROOT)
    return [
        Block(
            f"{page}:{text.count(chr(10), 0, match.start('code'))}",
            match["language"],
            textwrap.dedent(match["code"]),
            match["mark"] or "",
            match["reason"] or "",
        )
        for match in _FENCE.finditer(text)
    ]


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
