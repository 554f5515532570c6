r"""The final number of a calculation, as in GSM8K (Cobbe et al. 2021, arXiv 2110.14168).

Two ways to extract it from an answer:

- strict: the number after the last `####` (the data set's format) or in the last `\boxed{}`;
- flexible: the same; otherwise the number after the last "answer is" or "answer:"; otherwise the
  last number in the text.

Numbers are compared by value: `#### 1,234.50`, `\boxed{\$1234.5}` and `1234.50 dollars.` are equal.
A comma before three digits separates thousands. Currency signs, percent signs, units and a final
dot are ignored. `1/2` and `\frac{1}{2}` are fractions.
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
# Rejects numbers that are ambiguous as `3,5` and `1e5` are.
_NUMBER = re.compile(_VALUE + r"(?:\s*/\s*(?P<below>\d+))?(?![.,]?\d|[eE][-+]?\d)")
_MAX_DIGITS = 300  # a policy may write endless digits
_FRACTION = re.compile(r"([-+]?)\s*\\[dt]?frac\{(\d+)\}\{(\d+)\}")
# After a digit, a letter or a bracket, a minus is an operator, not a sign.
_ANYWHERE = re.compile(
    r"(?:(?<![\w)\]}])[-+])?[$€£¥]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+"
)
_MARK = re.compile(r"####|\\boxed\s*\{")
_ANSWER_IS = re.compile(r"answer\s*(?:is\b|:|=)\s*:?", re.IGNORECASE)
_UNITS = re.compile(r"[\s%.°A-Za-z]*")


def gsm8k_answer(
    *, extract: str = "strict", column: str = "answer", format_score: float = 0.0
) -> Callable[[str, str, Mapping[str, Any]], float]:
    r"""A function for `text_reward`: 1 where the completion's final number is the row's, else 0.

    Args:
      extract: "strict" or "flexible", see the module's docstring.
      column: column of the row with the right answer: a number, or a text that is a number or ends
        in `#### number`.
      format_score: score of an answer with a wrong number; an answer without a number scores 0.

    >>> gsm8k_answer()("", "48 / 2 = 24, and so\n#### 72.", {"answer": "… #### 72"})
    1.0

    Raises:
      ValueError: an unknown `extract`; when called, a row without a right answer.
    """
    check_extract(extract)

    def gsm8k(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        right = right_number(row, column)
        answer = final_number(completion, extract)
        if answer is None:
            return 0.0
        return 1.0 if answer == right else format_score

    return gsm8k


def final_number(text: str, extract: str = "strict") -> Fraction | None:
    """The final number of a text, extracted as the module's docstring says; None without one."""
    check_extract(extract)
    marks = list(_MARK.finditer(text))
    if marks:
        mark = marks[-1]
        if mark.group() == "####":
            number = _leading(text[mark.end() :].split("\n", 1)[0], alone=False)
        else:
            number = _leading(_braced(text, mark.end()), alone=True)
        if number is not None:
            return number
    if extract == "strict":
        return None
    plain = _plain(text)
    for phrase in reversed(list(_ANSWER_IS.finditer(plain))):
        number = _leading(plain[phrase.end() :].lstrip(" *_"), alone=False)
        if number is not None:
            return number
    numbers = _ANYWHERE.findall(plain)
    return _leading(numbers[-1], alone=False) if numbers else None


def parse_number(text: str) -> Fraction | None:
    """The value of a text that is a number, with optional sign, currency and unit; else None."""
    return _leading(text, alone=True)


def check_extract(extract: str) -> None:
    """Checks the option `extract`."""
    if extract not in EXTRACTS:
        raise ValueError(f"gsm8k extract={extract!r}: wanted one of {', '.join(EXTRACTS)}")


def right_number(row: Mapping[str, Any], column: str) -> Fraction:
    """The right answer of a row.

    Raises:
      ValueError: the row has none.
    """
    value = row.get(column)
    text = "" if value is None or isinstance(value, bool) else str(value)
    number = parse_number(text.rpartition("####")[2])
    if number is None:
        raise ValueError(
            f"the row's {column!r} is {value!r}; wanted a number, or a text that ends in "
            "'#### number' (column= names another)"
        )
    return number


def _plain(text: str) -> str:
    """Removes LaTeX in and around numbers."""
    text = text.replace("−", "-").replace("{,}", ",")
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}", " ", text)
    return re.sub(r"\\[!,;: ]", "", text).replace("\\$", "$").replace("\\%", "%")


def _leading(text: str, *, alone: bool) -> Fraction | None:
    """The number at the start of a text; `alone`: only a unit may follow it."""
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
    if max(len(above), len(below)) > _MAX_DIGITS or int(below) == 0:
        return None
    if alone and not _UNITS.fullmatch(text[end:]):
        return None
    value = Fraction(above) / int(below)
    return -value if sign == "-" else value


def _braced(text: str, start: int) -> str:
    """The text from `start`, just after an opening brace, to the brace that closes it."""
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return ""


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gsm8kReward(RewardSpec):
    """The final number of a calculation: 1 if it is the row's, else 0. docs/rewards.md.

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
