"""Where the steps of an answer end, in tokens."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.data.chat import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def step_ends(tok: PreTrainedTokenizerBase, document: Encoded, steps: Sequence[str]) -> list[int]:
    """The index of the token that holds the last character of each step.

    Characters are counted without blanks, since a template may strip an answer's ends.

    Args:
      tok: a fast transformers tokenizer.
      document: a prompt with an answer, the answer trained.
      steps: the texts that make up the answer.

    Returns:
      One index into `document.ids` a step.

    Raises:
      ValueError: the tokens do not hold the steps' characters in order (a tokenizer that rewrites
        text), or two steps end in the same token.
    """
    first = int(np.argmax(document.trained))
    ids = document.ids[first:].tolist()
    whole = "".join(steps)
    seen = _seen_by_offsets(tok, whole, ids)
    wanted = np.cumsum([_solid(step) for step in steps])
    if seen is None:
        # A token may hold part of a character: decode what is there up to each token instead.
        def solid_up_to(count: int) -> int:
            return _solid(str(tok.decode(ids[:count], skip_special_tokens=True)).rstrip("\ufffd"))

        ends = [
            bisect.bisect_left(range(1, len(ids) + 1), total, key=solid_up_to) for total in wanted
        ]
    else:
        ends = np.searchsorted(seen, wanted).tolist()
    if max(ends) >= len(ids) or len(set(ends)) < len(ends):
        raise ValueError(
            f"steps: the tokens of {whole[:60]!r} do not tell its {len(steps)} steps apart; "
            "separate steps by a line break, or use another tokenizer"
        )
    return [first + end for end in ends]


def _seen_by_offsets(
    tok: PreTrainedTokenizerBase, whole: str, ids: Sequence[int]
) -> np.ndarray | None:
    """Solid characters up to and with each token, if the answer's tokens are those of its text."""
    for text in (whole, whole.strip()):
        found = tok(text, add_special_tokens=False, return_offsets_mapping=True)
        alone = found["input_ids"]
        if list(ids[: len(alone)]) == list(alone):
            solid = np.cumsum([0, *(not c.isspace() for c in text)])
            return solid[[end for _, end in found["offset_mapping"]]]
    return None


def _solid(text: str) -> int:
    return sum(not c.isspace() for c in text)
