"""A reward for answers that match a regular expression."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign.rewards.limits import check_timeout
from jaxalign.rewards.specs import BuildContext, RewardFunction, RewardSpec, register_reward
from jaxalign.rewards.text import text_reward

HOWS = ("search", "fullmatch")


def regex_match(
    pattern: str, *, how: str = "search", column: str | None = None
) -> Callable[[str, str, Mapping[str, Any] | None], float]:
    r"""A function for `text_reward`: 1 if the completion matches, else 0.

    Args:
      pattern: in Python's syntax, with inline flags: `(?is)` ignores case and lets `.` match line
        ends.
      how: "search" anywhere in the completion, or "fullmatch" all of it.
      column: if set, the first group (the whole match, if there is no group) must equal the row's
        text or number in this column, apart from surrounding whitespace.

    >>> regex_match(r"<answer>(.*?)</answer>", column="answer")("", "<answer> 4</answer>",
    ...     {"answer": "4"})
    1.0

    Raises:
      ValueError: an invalid pattern, or an unknown `how`.
    """
    check_regex(pattern, how)
    find = getattr(re.compile(pattern), how)

    def regex(prompt: str, completion: str, row: Mapping[str, Any] | None = None) -> float:
        match = find(completion)
        if match is None:
            return 0.0
        if column is None:
            return 1.0
        if row is None or row.get(column) is None:
            raise ValueError(f"the row has no column {column!r} to compare the match with")
        text = match.group(1 if match.re.groups else 0)
        return float(text is not None and text.strip() == str(row[column]).strip())

    return regex


def check_regex(pattern: str, how: str) -> None:
    """Checks the options of `regex_match`."""
    if how not in HOWS:
        raise ValueError(f"regex reward how={how!r}: wanted one of {', '.join(HOWS)}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex reward pattern={pattern!r}: {error}") from error


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class RegexReward(RewardSpec):
    """A regular expression; see `regex_match`.

    Attributes:
      pattern: in Python's syntax.
      how: "search" or "fullmatch".
      column: column of the row that the match must equal; None: a match is enough.
      with_prefill: whether the pattern also sees the start of the answer that the template wrote at
        the end of the prompt, such as `<think>`.
      timeout: seconds allowed per answer: a pattern such as `(a+)+$` can take time exponential in
        the answer's length. None: no limit.
    """

    kind: str = "regex"
    pattern: str
    how: str = "search"
    column: str | None = None
    with_prefill: bool = False
    timeout: float | None = 30.0

    def __post_init__(self):
        super().__post_init__()
        check_regex(self.pattern, self.how)
        check_timeout("regex", self.timeout)

    def build(self, context: BuildContext) -> RewardFunction:
        """`regex_match` as a `TextReward`."""
        score = regex_match(self.pattern, how=self.how, column=self.column)
        return text_reward(
            score,
            context.tok,
            rows=context.rows,
            name=context.name,
            with_prefill=self.with_prefill,
            timeout=self.timeout,
        )
