"""Instruction following that a program can verify, as in IFEval.

Zhou et al. 2023, https://arxiv.org/abs/2311.07911. A row lists instruction ids in
`instruction_id_list` and their arguments, in the same order, in `kwargs`. *Strict* checks the
answer itself. *Loose* accepts it if one of eight variants follows the instruction: whole, without
the first line, without the last, without both (a greeting, a closing remark), each with and without
the asterisks of markdown.
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
    """A function for `text_reward`: whether a completion follows the instructions of its row.

    Args:
      mode: "strict" or "loose", see the module's docstring.
      per: "instruction": the share of followed instructions, in [0, 1]; "prompt": 1 if all are
        followed, else 0.
      detect: text → language code, for rows that ask for a language; None: the library langdetect,
        if it is installed.

    Raises:
      ValueError: an unknown option; when called, a row without instructions, an unknown
        instruction, wrong arguments, or a language instruction without a detector.

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
    """The paper's four accuracies.

    Args:
      completions: one answer per row.
      rows: data rows with `instruction_id_list` and `kwargs`.
      detect: see `ifeval_constraints`.

    Returns:
      `{prompt,instruction}_{strict,loose}`, in [0, 1]: the share of prompts whose instructions are
      all followed, and the share of followed instructions.

    Raises:
      ValueError: as `ifeval_constraints`; no rows, or not as many completions.
    """
    if not rows or len(rows) != len(completions):
        raise ValueError(f"{len(completions)} completions for {len(rows)} rows: wanted one each")
    figures = {}
    for mode in MODES:
        followed = [
            follow(text, row, mode, detect) for text, row in zip(completions, rows, strict=True)
        ]
        flat = [result for results in followed for result in results]
        figures[f"prompt_{mode}"] = sum(map(all, followed)) / len(followed)
        figures[f"instruction_{mode}"] = sum(flat) / len(flat)
    return figures


def follow(
    completion: str, row: Mapping[str, Any], mode: str = "strict", detect: Detect | None = None
) -> list[bool]:
    """Whether a completion follows each instruction of its row; an empty one follows none."""
    checks = instructions(row, detect)
    variants = [completion] if mode == "strict" else _loose_variants(completion)
    return [any(text.strip() and check(text) for text in variants) for check in checks]


def check_ifeval(mode: str, per: str) -> None:
    """Checks the options of `ifeval_constraints`."""
    for name, value, known in (("mode", mode, MODES), ("per", per, PERS)):
        if value not in known:
            raise ValueError(f"ifeval {name}={value!r}: wanted one of {', '.join(known)}")


def _loose_variants(text: str) -> list[str]:
    lines = text.split("\n")
    shortened = (lines[1:], lines[:-1], lines[1:-1])
    variants = [text, *("\n".join(part).strip() for part in shortened)]
    return variants + [variant.replace("*", "") for variant in variants]


def instructions(
    row: Mapping[str, Any], detect: Detect | None = None
) -> list[Callable[[str], bool]]:
    """The checks of a row's instructions, with their arguments bound.

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
            f"instruction {LANGUAGE!r}: the language of a text is detected by the library "
            "langdetect, which is not installed; pip install langdetect, or leave such rows out"
        ) from None
    langdetect.DetectorFactory.seed = 0  # it samples; a seed makes it reproducible

    def detect(text: str) -> str:
        try:
            return str(langdetect.detect(text))
        except langdetect.LangDetectException:  # a text without letters
            return ""

    return detect


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class IfevalReward(RewardSpec):
    """Checkable instructions of the row, as IFEval has them. docs/rewards.md.

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
