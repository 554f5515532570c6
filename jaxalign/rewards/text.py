"""Rewards of texts: Python functions of prompt, completion and the row of data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.parallel.sharding import local_rows
from jaxalign.rewards.cases import Case, RewardError, Rows, cases_of, origin_in
from jaxalign.types import PromptBatch, Scores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[Sequence[Case]], Sequence[float | None]]
"""Cases → a score each; None: the reward does not apply to it."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class TextReward:
    """A reward function that judges text; made by `text_reward`, `batch_reward` and others.

    Called like any reward function it gives scores `[B]`, and wants one for every answer. Rows that
    only fill up the batch are not asked about, and score 0.

    Args:
      judge: cases → scores.
      tok: the policy's tokenizer.
      rows: the rows behind the prompts; see `text_reward`.
      name: how it is called in errors.
    """

    def __init__(self, judge: Judge, tok: PreTrainedTokenizerBase, rows: Any, name: str):
        self.name = name
        self._judge = judge
        self._tok = tok
        self._rows = rows if isinstance(rows, Rows) else Rows(rows)

    def __call__(self, tokens: TokenBatch, prompts: PromptBatch) -> np.ndarray:
        """Scores of all answers, float32 `[B]`."""
        cases, said = self._ask(tokens, prompts, self.name)
        for case, score in zip(cases, said, strict=True):
            if score is None:
                raise TypeError(
                    f"reward {self.name!r} gave None for {case}; wanted a number (None, for rows "
                    "that a reward does not apply to, needs another that does: combine_rewards)"
                )
        return self._spread(tokens, cases, said).values  # pyrefly: ignore[bad-return]

    def scores(self, tokens: TokenBatch, prompts: PromptBatch, name: str | None = None) -> Scores:
        """The scores, of which some may not apply.

        Args:
          tokens: prompts with answers.
          prompts: the prompts.
          name: how the reward is called in errors; None: its own name.
        """
        return self._spread(
            tokens, *self._ask(tokens, prompts, self.name if name is None else name)
        )

    def only(self, applies: Callable[[Case], bool]) -> TextReward:
        """The same reward, which is not asked about cases that it does not apply to."""

        def judge(cases: Sequence[Case]) -> list[float | None]:
            asked = [case for case in cases if applies(case)]
            said = list(self._judge(asked)) if asked else []
            if len(said) != len(asked):
                raise RewardError(f"gave {len(said)} scores for {len(asked)} answers")
            left = iter(said)
            return [next(left) if applies(case) else None for case in cases]

        return TextReward(judge, self._tok, self._rows, self.name)

    def _ask(
        self, tokens: TokenBatch, prompts: PromptBatch, name: str
    ) -> tuple[list[Case], list[float | None]]:
        cases = cases_of(self._tok, tokens, prompts, self._rows)
        try:
            given = self._judge(cases) if cases else []
        except _CaseFailed as failure:
            raise RewardError(
                f"reward {name!r} failed for {failure.case}: {failure}"
            ) from failure.__cause__
        except RewardError as error:
            raise RewardError(f"reward {name!r}: {error}") from error
        except Exception as error:
            raise RewardError(
                f"reward {name!r} failed for {len(cases)} answers, the first of them {cases[0]}: "
                f"{_told(error)}"
            ) from error
        if not hasattr(given, "__len__") or len(given) != len(cases):
            count = len(given) if hasattr(given, "__len__") else f"a {type(given).__name__}"
            raise RewardError(f"reward {name!r} gave {count} scores for {len(cases)} answers")
        return cases, [_number(s, case, name) for s, case in zip(given, cases, strict=True)]

    def _spread(
        self, tokens: TokenBatch, cases: Sequence[Case], said: Sequence[float | None]
    ) -> Scores:
        count = len(local_rows(tokens.loss_mask))
        values = np.zeros(count, np.float32)
        applies = np.zeros(count, np.bool_)
        for case, score in zip(cases, said, strict=True):
            if score is not None:
                values[case.place], applies[case.place] = score, True
        return Scores(values, applies)


def text_reward(
    function: Callable[..., float | None],
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    name: str | None = None,
) -> TextReward:
    """A score computed from text: `function(prompt, completion)`, or with the row as third.

    Special tokens are left out of both texts. The function runs in Python, one row at a time; an
    exception in it stops the run, and so does a score that is no finite number. The row is passed
    to functions with a parameter `row`, or with a third one that has no default; a `row` that has a
    default is left to it where there are no rows.

    Args:
      function: gives a number, or None where it does not apply (see `combine_rewards`).
      tok: the policy's tokenizer.
      rows: where the rows are: what `prompt_batches` gave (or its `examples`), or dicts in the
        order of `PromptBatch.index`. The row is a dict of all columns.
      name: how the reward is called in errors; None: the function's name.

    Raises:
      ValueError: the function wants the row, and no `rows` are given.
    """
    name = _name_of(function) if name is None else name
    place = _place_of_row(function)
    if rows is None and place is not None:
        if place.default is place.empty:
            raise ValueError(
                f"reward {name!r} takes the data row, and there are no rows; pass rows= (what "
                "prompt_batches gave)"
            )
        place = None

    def judge(cases: Sequence[Case]) -> list[float | None]:
        said = []
        for case in cases:
            texts, named = (case.prompt, case.completion), {}
            if place is not None and place.kind is place.KEYWORD_ONLY:
                named = {place.name: case.row}
            elif place is not None:
                texts += (case.row,)
            try:
                said.append(function(*texts, **named))
            except Exception as error:
                raise _CaseFailed(case, error) from error
        return said

    return TextReward(judge, tok, rows, name)


def batch_reward(
    function: Callable[..., Sequence[float | None]],
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    name: str | None = None,
) -> TextReward:
    """Scores of all answers of a batch at once, by a function in the form that TRL has for them.

    It is called `function(prompts=…, completions=…, **columns)`: lists of one entry an answer, and
    so is every column of the rows but `prompt` and `completion` (None where a row lacks it). Where
    the rows' prompts are lists of messages, prompts are too, and completions are lists of one
    assistant message, as in TRL's GRPOTrainer; otherwise both are texts.

    Args:
      function: gives a list of numbers, None where it does not apply.
      tok: the policy's tokenizer.
      rows: see `text_reward`; None: there are no columns.
      name: how the reward is called in errors; None: the function's name.
    """

    def judge(cases: Sequence[Case]) -> Sequence[float | None]:
        data = [case.row for case in cases if case.row is not None]
        columns = dict.fromkeys(key for row in data for key in row)
        values = {
            key: [row.get(key) for row in data]
            for key in columns
            if key not in ("prompt", "completion")
        }
        turns = bool(data) and all(isinstance(row.get("prompt"), list) for row in data)
        if turns:
            prompts: list[Any] = [row["prompt"] for row in data]
            completions: list[Any] = [
                [{"role": "assistant", "content": case.completion}] for case in cases
            ]
        else:
            prompts, completions = map(
                list, zip(*((c.prompt, c.completion) for c in cases), strict=True)
            )
        return function(prompts=prompts, completions=completions, **values)

    return TextReward(judge, tok, rows, _name_of(function) if name is None else name)


class _CaseFailed(Exception):
    """A function failed for one case."""

    def __init__(self, case: Case, error: Exception):
        super().__init__(_told(error))
        self.case = case


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}{origin_in(error)}"


def _place_of_row(function: Callable[..., Any]) -> inspect.Parameter | None:
    """The parameter that takes the row, if there is one."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return None
    third = [p for p in found if p.kind in _POSITIONAL][2:3]
    if third and (third[0].name == "row" or third[0].default is inspect.Parameter.empty):
        return third[0]
    return next((p for p in found if p.name == "row" and p.kind is p.KEYWORD_ONLY), None)


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _number(score: Any, case: Case, name: str) -> float | None:
    if score is None:
        return None
    try:
        number = math.nan if isinstance(score, str) else float(score)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RewardError(
            f"reward {name!r} gave {score!r} for {case}; wanted a finite number (or None where it "
            "does not apply)"
        )
    return number


def scores_of(
    reward: Callable[[TokenBatch, PromptBatch], Any],
    tokens: TokenBatch,
    prompts: PromptBatch,
    name: str,
) -> Any:
    """What a reward says: `Scores` of a text reward, in which some may not apply, or as it gives.

    Raises:
      RewardError: it fails; the message calls it by `name`.
    """
    if isinstance(reward, TextReward):
        return reward.scores(tokens, prompts, name)
    try:
        return reward(tokens, prompts)
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward {name!r} failed: {_told(error)}") from error
