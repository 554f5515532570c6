r"""The final number of a calculation, as in GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

Two ways to find it in an answer:

- strict: the number after the last `####`, the form of the data set, or in the last `\boxed{}`;
- flexible: that; failing it, the number after the last "answer is" or "answer:"; failing that too,
  the last number in the text.

Numbers are compared by value: `#### 1,234.50`, `\boxed{\$1234.5}` and `1234.50 dollars.` are the
same. A comma before three digits parts thousands; currency signs, a per cent sign, units and a dot
at the end do not count; `1/2` and `\frac{1}{2}` are fractions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from jaxalign.rewards.specs import (
    BuildContext,
    RewardFunction,
    RewardSpec,
    check_option,
    register_reward,
)
from jaxalign.rewards.text import text_reward

EXTRACTS = ("strict", "flexible")

_VALUE = (
    r"(?P<sign>[-+]?)\s*[$€£¥]?\s*(?P<inner>[-+]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?"
)
# What goes on as 3,5 or 1e5 do is no number that could be read with certainty.
_NUMBER = re.compile(_VALUE + r"(?:\s*/\s*(?P<below>\d+))?(?![.,]?\d|[eE][-+]?\d)")
_MOST_DIGITS = 300  # a policy may write digits without end
_FRACTION = re.compile(r"([-+]?)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# A minus after a digit, a letter or a bracket is no sign.
_ANYWHERE = re.compile(
    r"(?:(?<![\w)\]}])[-+])?[$€£¥]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+"
)
_MARK = re.compile(r"####|\\boxed\s*\{")
_SAID = re.compile(r"answer\s*(?:is\b|:|=)\s*:?", re.IGNORECASE)
_UNITS = re.compile(r"[\s%.°A-Za-z]*")


def gsm8k_answer(
    *, extract: str = "strict", column: str = "answer", format_score: float = 0.0
) -> Callable[[str, str, Mapping[str, Any]], float]:
    r"""A function for `text_reward`: 1 where the completion's final number is the row's, else 0.

    Args:
      extract: "strict" or "flexible", see this module.
      column: where the row has the right answer: a number, or a text that is one or that ends in
        `#### number`.
      format_score: for an answer with a number that is not the right one; an answer without any
        gets 0.

    >>> gsm8k_answer()("", "48 / 2 = 24, and so\n#### 72.", {"answer": "… #### 72"})
    1.0

    Raises:
      ValueError: an unknown `extract`; when called, a row without a right answer.
    """
    check_extract(extract)

    def gsm8k(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        right = right_number(row, column)
        said = final_number(completion, extract)
        if said is None:
            return 0.0
        return 1.0 if said == right else format_score

    return gsm8k


def final_number(text: str, extract: str = "strict") -> Fraction | None:
    """The number that a text ends in, found as this module tells; None if there is none."""
    check_extract(extract)
    marks = list(_MARK.finditer(text))
    if marks:
        mark = marks[-1]
        if mark.group() == "####":
            found = _leading(text[mark.end() :].split("\n", 1)[0], alone=False)
        else:
            found = _leading(_braced(text, mark.end()), alone=True)
        if found is not None:
            return found
    if extract == "strict":
        return None
    plain = _plain(text)
    for said in reversed(list(_SAID.finditer(plain))):
        found = _leading(plain[said.end() :].lstrip(" *_"), alone=False)
        if found is not None:
            return found
    numbers = _ANYWHERE.findall(plain)
    return _leading(numbers[-1], alone=False) if numbers else None


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is a number, with or without sign, currency and unit; or None."""
    return _leading(text, alone=True)


def check_extract(extract: str) -> None:
    """Refuses an unknown way to find the number."""
    if extract not in EXTRACTS:
        raise ValueError(f"gsm8k extract={extract!r}: wanted one of {', '.join(EXTRACTS)}")


def right_number(row: Mapping[str, Any], column: str) -> Fraction:
    """The right answer of a row.

    Raises:
      ValueError: the row has none.
    """
    given = row.get(column)
    text = "" if given is None or isinstance(given, bool) else str(given)
    found = parse_number(text.rpartition("####")[2])
    if found is None:
        raise ValueError(
            f"the row's {column!r} is {given!r}; wanted a number, or a text that ends in "
            "'#### number' (column= names another)"
        )
    return found


def _plain(text: str) -> str:
    """Without the LaTeX that may stand in and around a number."""
    text = text.replace("−", "-").replace("{,}", ",")
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", " ", text)
    return re.sub(r"\\[!,;: ]", "", text).replace("\\$", "$").replace("\\%", "%")


def _leading(text: str, *, alone: bool) -> Fraction | None:
    """The number at the start of a text; `alone`: nothing but a unit may follow."""
    text = _plain(text).strip().strip("$*").strip()
    fraction = _FRACTION.match(text)
    if fraction is not None:
        sign, above, below = fraction.groups()
        end = fraction.end()
    else:
        number = _NUMBER.match(text)
        if number is None or not (number["whole"] or number["part"]):
            return None
        sign = "-" if "-" in number["sign"] + number["inner"] else ""
        above = (number["whole"] or "0").replace(",", "") + (number["part"] or "")
        below, end = number["below"] or "1", number.end()
    if max(len(above), len(below)) > _MOST_DIGITS or int(below) == 0:
        return None
    if alone and not _UNITS.fullmatch(text[end:]):
        return None
    value = Fraction(above) / int(below)
    return -value if sign == "-" else value


def _braced(text: str, start: int) -> str:
    """What stands between a brace that is open at `start` and the one that closes it."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return ""


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8kReward(RewardSpec):
    """The final number of a calculation; see this module.

    Attributes:
      extract: "strict" or "flexible".
      column: column of the row with the right answer.
      format_score: score of a number that is not the right one.
    """

    kind: str = "gsm8k"
    extract: str = "strict"
    column: str = "answer"
    format_score: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_extract(self.extract)
        finite = math.isfinite(self.format_score)
        check_option(finite, "format_score", self.format_score, "a finite number")

    def build(self, context: BuildContext) -> RewardFunction:
        """`gsm8k_answer` as a `TextReward`; every row must have a right answer."""
        self.check_rows(context, lambda row: right_number(row, self.column))
        score = gsm8k_answer(
            extract=self.extract, column=self.column, format_score=self.format_score
        )
        return text_reward(score, context.tok, rows=context.rows, name=context.name)
