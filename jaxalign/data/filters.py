"""What is left out before tokenising: held-out rows, other scripts, copies and near-copies.

All of it depends on what rows say, never on where they stand, so that adding a file or running on
other hosts changes nothing about the other rows.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.minhash import NearCopies

if TYPE_CHECKING:
    from jaxalign.data.options import Options

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

OTHER_SPLIT = "held out for validation"
NOT_HELD_OUT = "not held out: belongs to training"


def check_scripts(scripts: Sequence[str] | None) -> None:
    """Refuses unknown names."""
    for name in scripts if scripts is not None else ():
        if name not in SCRIPTS:
            raise ValueError(f"scripts: got {name!r}, wanted some of {', '.join(SCRIPTS)}")


def sift(examples: Sequence[Any], options: Options) -> tuple[list[int], dict[int, str]]:
    """Applies the split, the script filter and de-duplication, in this order.

    Args:
      examples: of any of the types in `jaxalign.data.examples`, in the order of the data.
      options: `validation`, `split`, `scripts`, `script_share`, `dedup`, `dedup_threshold`.

    Returns:
      The indices of the examples that stay, and why the others do not.
    """
    dropped: dict[int, str] = {}
    stay = list(range(len(examples)))

    def drop(keep: list[bool], reason: str) -> None:
        nonlocal stay
        dropped.update((i, reason) for i, kept in zip(stay, keep, strict=True) if not kept)
        stay = [i for i, kept in zip(stay, keep, strict=True) if kept]

    if options.validation is not None:
        held = held_out([prompt_key(example) for example in examples], options.validation)
        train = options.split == "train"
        drop([h != train for h in held], OTHER_SPLIT if train else NOT_HELD_OUT)
    if options.scripts:
        scripts = options.scripts
        shares = [script_share(" ".join(_texts(examples[i])), scripts) for i in stay]
        drop(
            [share >= options.script_share for share in shares],
            f"less than {options.script_share:g} of the letters {' or '.join(scripts)}",
        )
    if options.dedup is not None:
        seen: set[str] = set()
        keep = []
        for i in stay:
            key = _content(examples[i])
            keep.append(key not in seen)
            seen.add(key)
        drop(keep, "the same as an earlier row")
    if options.dedup == "near":
        near = NearCopies(options.dedup_threshold)
        keep = [near.add("\n".join(_texts(examples[i]))) for i in stay]
        drop(keep, "nearly the same as an earlier row")
    return stay, dropped


def held_out(keys: Sequence[str], validation: float) -> list[bool]:
    """Which rows are held out, by their keys alone.

    Args:
      keys: equal for rows that must stay together.
      validation: a part in (0, 1): every key whose hash, as a number in [0, 1), lies below it. A
        number of rows: keys in the order of their hashes, each with all its rows, as long as no
        more than that many come together.
    """
    hashes = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") for key in keys]
    if validation < 1:
        return [value < validation * 2**64 for value in hashes]
    sizes = Counter(hashes)
    chosen: set[int] = set()
    room = int(validation)
    for value in sorted(sizes):
        if sizes[value] <= room:
            chosen.add(value)
            room -= sizes[value]
        if not room:
            break
    return [value in chosen for value in hashes]


def prompt_key(example: Any) -> str:
    """What rows with the same prompt have in common: all that is said before the first answer.

    Of a plain text, the text.
    """
    if hasattr(example, "text"):
        return example.text
    messages = example.prompt if hasattr(example, "prompt") else example.messages
    said = []
    for message in messages:
        if message["role"] == "assistant":
            break
        said.append((message["role"], message["content"]))
    return json.dumps(said, ensure_ascii=False, default=str)


def script_share(text: str, scripts: Sequence[str]) -> float:
    """The part of a text's letters that belong to some scripts; 1 of a text without letters."""
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


def _content(example: Any) -> str:
    """All that an example says and asks for, without where it came from."""
    fields = example._asdict()
    fields.pop("origin")
    if "row" in fields:  # a prompt's other columns are not part of the prompt
        fields.pop("row")
    text = json.dumps(fields, ensure_ascii=False, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _texts(example: Any) -> Iterator[str]:
    """All texts of an example, in order."""
    for name, value in example._asdict().items():
        if name not in ("origin", "row", "tools"):
            yield from _strings(value)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        content = value.get("content")
        yield from _strings(content)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
