"""Constraints that an answer is to follow, checked by a program, as in IFEval.

Zhou et al. 2023, https://arxiv.org/abs/2311.07911. A row names instructions in
`instruction_id_list` and their arguments, in the same order, in `kwargs`. *Strict* looks at the
answer as it is. *Loose* is content if any of eight forms of it follows: without its first line, its
last, or both (a greeting, a closing remark), each with and without the asterisks of markdown.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxalign.rewards.ifeval_checks import CHECKS, LANGUAGE, Detect
from jaxalign.rewards.specs import BuildContext, RewardFunction, RewardSpec, register_reward
from jaxalign.rewards.text import text_reward

MODES = ("strict", "loose")
PERS = ("instruction", "prompt")


def ifeval_constraints(
    *, mode: str = "strict", per: str = "instruction", detect: Detect | None = None
) -> Callable[[str, str, Mapping[str, Any]], float]:
    """A function for `text_reward`: how far a completion follows the instructions of its row.

    Args:
      mode: "strict" or "loose", see this module.
      per: "instruction": the part of the instructions that are followed, in [0, 1]; "prompt": 1
        where all of them are, else 0.
      detect: text → language code, for rows that ask for a language; None: the library langdetect,
        where it is installed.

    Raises:
      ValueError: an unknown option; when called, a row without instructions, an instruction that
        is not known or lacks an argument, or a language to be told without a library that can.

    >>> ids = ["punctuation:no_comma", "startend:quotation"]
    >>> row = {"instruction_id_list": ids, "kwargs": [{}, {}]}
    >>> ifeval_constraints()("", "No comma here.", row)
    0.5
    """
    check_ifeval(mode, per)

    def ifeval(prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        followed = follow(completion, row, mode, detect)
        return float(all(followed)) if per == "prompt" else sum(followed) / len(followed)

    return ifeval


def ifeval_accuracy(
    completions: Sequence[str], rows: Sequence[Mapping[str, Any]], detect: Detect | None = None
) -> dict[str, float]:
    """The four figures of the paper.

    Args:
      completions: an answer a row.
      rows: with `instruction_id_list` and `kwargs`.
      detect: see `ifeval_constraints`.

    Returns:
      `{prompt,instruction}_{strict,loose}`: the part of the prompts all of whose instructions are
      followed, and of all instructions, in [0, 1].

    Raises:
      ValueError: as `ifeval_constraints`; no rows, or not as many completions.
    """
    if not rows or len(rows) != len(completions):
        raise ValueError(f"{len(completions)} completions for {len(rows)} rows: wanted as many")
    figures = {}
    for mode in MODES:
        followed = [
            follow(each, row, mode, detect) for each, row in zip(completions, rows, strict=True)
        ]
        flat = [one for each in followed for one in each]
        figures[f"prompt_{mode}"] = sum(map(all, followed)) / len(followed)
        figures[f"instruction_{mode}"] = sum(flat) / len(flat)
    return figures


def follow(
    completion: str, row: Mapping[str, Any], mode: str = "strict", detect: Detect | None = None
) -> list[bool]:
    """Whether a completion follows each instruction of its row; an empty one follows none."""
    checks = instructions(row, detect)
    forms = [completion] if mode == "strict" else _loosened(completion)
    return [any(form.strip() and check(form) for form in forms) for check in checks]


def check_ifeval(mode: str, per: str) -> None:
    """Refuses unknown options."""
    for name, value, known in (("mode", mode, MODES), ("per", per, PERS)):
        if value not in known:
            raise ValueError(f"ifeval {name}={value!r}: wanted one of {', '.join(known)}")


def _loosened(text: str) -> list[str]:
    lines = text.split("\n")
    cut = (lines[1:], lines[:-1], lines[1:-1])
    forms = [text, *("\n".join(part).strip() for part in cut)]
    return forms + [form.replace("*", "") for form in forms]


def instructions(
    row: Mapping[str, Any], detect: Detect | None = None
) -> list[Callable[[str], bool]]:
    """The checks of a row, with their arguments.

    Raises:
      ValueError: see `ifeval_constraints`.
    """
    ids, options = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(ids, list) or not isinstance(options, list) or len(ids) != len(options):
        raise ValueError(
            f"the row has instruction_id_list={ids!r} and kwargs={options!r}; wanted two lists of "
            "the same length"
        )
    if not ids:
        raise ValueError("the row's instruction_id_list is empty; wanted at least one instruction")
    checks: list[Callable[[str], bool]] = []
    for name, given in zip(ids, options, strict=True):
        known = str(name).removeprefix("en:")
        if known not in CHECKS:
            raise ValueError(
                f"instruction {name!r}: not known (English only); known: {', '.join(CHECKS)}"
            )
        check = CHECKS[known]
        given = {key: value for key, value in (given or {}).items() if value is not None}
        if set(given) != set(check.arguments):
            raise ValueError(
                f"instruction {name!r}: got the arguments {sorted(given)}, wanted "
                f"{sorted(check.arguments)}"
            )
        if known == LANGUAGE:
            given["detect"] = detect if detect is not None else _langdetect()
        checks.append(functools.partial(check.follows, **given))
    return checks


@functools.cache
def _langdetect() -> Detect:
    try:
        import langdetect  # pyrefly: ignore[missing-import]
    except ImportError:
        raise ValueError(
            f"instruction {LANGUAGE!r}: which language a text is in is told by the library "
            "langdetect, which is not installed; pip install langdetect, or leave such rows out"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it draws samples: the same text, the same answer

    def detect(text: str) -> str:
        try:
            return str(langdetect.detect(text))
        except langdetect.LangDetectException:  # no letters in it
            return ""

    return detect


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class IfevalReward(RewardSpec):
    """Checkable instructions; see this module.

    Attributes:
      mode: "strict" or "loose".
      per: "instruction" or "prompt".
    """

    kind: str = "ifeval"
    mode: str = "strict"
    per: str = "instruction"

    def __post_init__(self):
        super().__post_init__()
        check_ifeval(self.mode, self.per)

    def build(self, context: BuildContext) -> RewardFunction:
        """`ifeval_constraints` as a `TextReward`; every row must have known instructions."""
        self.check_rows(context, instructions)
        score = ifeval_constraints(mode=self.mode, per=self.per)
        return text_reward(score, context.tok, rows=context.rows, name=context.name)
