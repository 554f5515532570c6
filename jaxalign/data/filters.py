"""Filters before tokenising: held-out rows, other scripts, duplicates and near-duplicates.

Filters depend on the text of rows, never on their position. Adding a file or using more hosts
therefore does not change the result for other rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from jaxalign.data.minhash import NearCopies
from jaxalign.data.options import Options
from jaxalign.data.scripts import script_share

OTHER_SPLIT = "held out for validation"
NOT_HELD_OUT = "not held out: belongs to training"


def sift(examples: Sequence[Any], options: Options) -> tuple[list[int], dict[int, str]]:
    """Applies the split, the script filter and de-duplication, in this order.

    Args:
      examples: examples of any type in `jaxalign.data.examples`, in the order of the data.
      options: `validation`, `split`, `scripts`, `script_share`, `dedup`, `dedup_threshold`.

    Returns:
      The indices of the examples to keep, and the reasons for dropping the others.
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
    """Which rows are held out, based only on their keys.

    Args:
      keys: equal for rows that must stay together.
      validation: a fraction in (0, 1) selects every key whose hash, as a number in [0, 1), is below
        it. A number of rows selects keys in the order of their hashes, each with all its rows,
        while the total is at most that number.
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
    """A key that rows with the same prompt share: all messages before the first answer.

    For a plain text, the text itself.
    """
    if hasattr(example, "text"):
        return example.text
    messages = example.prompt if hasattr(example, "prompt") else example.messages
    turns = []
    for message in messages:
        if message["role"] == "assistant":
            break
        turns.append((message["role"], message["content"]))
    return json.dumps(turns, ensure_ascii=False, default=str)


def _content(example: Any) -> str:
    """All texts and labels of an example, without its origin."""
    fields = example._asdict()
    fields.pop("origin")
    if "row" in fields:  # a prompt's other columns do not belong to the prompt
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
