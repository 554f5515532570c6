"""Writing systems: the known ones, and the share of a text that is written in them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

SCRIPTS: dict[str, tuple[tuple[int, int], ...]] = {
    "latin": ((0x41, 0x5A), (0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF), (0xFF21, 0xFF5A)),
    "greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "armenian": ((0x530, 0x58F),),
    "georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x8A0, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFF)),
    "devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "bengali": ((0x980, 0x9FF),),
    "tamil": ((0xB80, 0xBFF),),
    "telugu": ((0xC00, 0xC7F),),
    "thai": ((0xE00, 0xE7F),),
    "hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "kana": ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "han": (
        *((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF)),
        *((0xF900, 0xFAFF), (0x20000, 0x323AF)),
    ),
}
"""Writing systems by ranges of code points (Unicode 16 blocks). Chinese is `han`, Japanese `han`
and `kana`, Korean `hangul`."""


def check_scripts(scripts: Sequence[str] | None) -> None:
    """Raises ValueError for unknown names."""
    for name in scripts if scripts is not None else ():
        if name not in SCRIPTS:
            raise ValueError(f"scripts: got {name!r}, wanted some of {', '.join(SCRIPTS)}")


def script_share(text: str, scripts: Sequence[str]) -> float:
    """The fraction of a text's letters in some scripts; 1 for a text without letters."""
    letters = np.frombuffer(
        "".join(c for c in text if unicodedata.category(c)[0] == "L").encode("utf-32-le"), np.uint32
    )
    if not letters.size:
        return 1.0
    ranges = [r for name in scripts for r in SCRIPTS[name]]
    inside = np.zeros(letters.shape, np.bool_)
    for first, last in ranges:
        inside |= (letters >= first) & (letters <= last)
    return float(inside.mean())
