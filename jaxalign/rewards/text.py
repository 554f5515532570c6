"""Text rewards: Python functions of prompt, completion and the data row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.time_limit import OutOfTime, call_within
from jaxalign.parallel.sharding import local_rows
from jaxalign.rewards.cases import Case, RewardError, Rows, case_of, cases_of, origin_in
from jaxalign.types import PromptBatch, Scores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxalign.sampling.stream import Watch

ScoreCases = Callable[[Sequence[Case]], Sequence[float | None]]
"""Cases → one score per case; None: the reward does not apply to it."""

_LARGEST = float(np.finfo(np.float32).max)  # scores are float32
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class TextReward:
    """A reward function of decoded text; `text_reward`, `batch_reward` and others make it.

    A call returns scores `[B]` and requires one for every answer. Padding rows of the batch are not
    scored and get 0.

    Args:
      score_cases: cases → scores.
      tok: the policy's tokenizer.
      rows: the data rows behind the prompts; see `text_reward`.
      name: the reward's name in errors.
      by_answer: whether the score of an answer depends on no other answer of the batch.

    Attributes:
      name: as above.
      by_answer: as above.
    """

    def __init__(
        self,
        score_cases: ScoreCases,
        tok: PreTrainedTokenizerBase,
        rows: Any,
        name: str,
        by_answer: bool = False,
    ):
        self.name, self.by_answer = name, by_answer
        self._score_cases = score_cases
        self._tok = tok
        self._rows = rows if isinstance(rows, Rows) else Rows(rows)
        self._early: dict[tuple[int, str, str], float | None] = {}

    def __call__(self, tokens: TokenBatch, prompts: PromptBatch) -> np.ndarray:
        """Scores of all answers, float32 `[B]`."""
        cases, scores = self._score(tokens, prompts, self.name)
        for case, score in zip(cases, scores, strict=True):
            if score is None:
                raise TypeError(
                    f"reward {self.name!r} gave None for {case}; wanted a number (None, for rows "
                    "that a reward does not apply to, needs another that does: combine_rewards)"
                )
        return self._scatter(tokens, cases, scores).values  # pyrefly: ignore[bad-return]

    def scores(self, tokens: TokenBatch, prompts: PromptBatch, name: str | None = None) -> Scores:
        """The scores, with a mask of the rows to which the reward applies.

        Args:
          tokens: prompts with answers.
          prompts: the prompts.
          name: the reward's name in errors; None: its own name.
        """
        name = self.name if name is None else name
        return self._scatter(tokens, *self._score(tokens, prompts, name))

    def only(self, applies: Callable[[Case], bool]) -> TextReward:
        """This reward restricted to cases for which `applies` is true; others get no score."""

        def score_cases(cases: Sequence[Case]) -> list[float | None]:
            selected = [case for case in cases if applies(case)]
            scores = list(self._score_cases(selected)) if selected else []
            if len(scores) != len(selected):
                raise RewardError(f"gave {len(scores)} scores for {len(selected)} answers")
            remaining = iter(scores)
            return [next(remaining) if applies(case) else None for case in cases]

        return TextReward(score_cases, self._tok, self._rows, self.name, self.by_answer)

    def early_watch(self, prompts: PromptBatch, name: str | None = None) -> Watch | None:
        """Scores answers as they end, while others are being written: a `watch` for `sample`.

        The next call takes these scores for the same answers. Functions run in this thread, while
        the devices compute, so that `timeout` holds.

        Args:
          prompts: the prompts of that call, one per answer.
          name: the reward's name in errors; None: its own name.

        Returns:
          None for a reward that scores all answers of a batch together.
        """
        if not self.by_answer:
            return None
        rows = PromptBatch(*map(np.asarray, prompts))
        early = self._early = {}
        before = np.zeros(len(rows.index), np.int32)
        scored = np.zeros(len(rows.index), np.bool_)

        def watch(tokens: np.ndarray, counts: np.ndarray) -> None:
            ended = (counts == before) & (counts > 0) & ~scored
            before[:] = counts
            for place in map(int, np.flatnonzero(ended)):
                scored[place] = True
                prompt = rows.tokens[place][rows.mask[place]]
                answer = tokens[place, : counts[place]]
                index = int(rows.index[place])
                case = case_of(self._tok, prompt, answer, place, index, self._rows)
                early[_key(case)] = self._scores_of([case], self.name if name is None else name)[0]

        return watch

    def _score(
        self, tokens: TokenBatch, prompts: PromptBatch, name: str
    ) -> tuple[list[Case], list[float | None]]:
        cases = cases_of(self._tok, tokens, prompts, self._rows)
        scores, self._early = self._early, {}
        rest = [case for case in cases if _key(case) not in scores]
        scores = scores | dict(zip(map(_key, rest), self._scores_of(rest, name), strict=True))
        return cases, [scores[_key(case)] for case in cases]

    def _scores_of(self, cases: Sequence[Case], name: str) -> list[float | None]:
        try:
            scores = self._score_cases(cases) if cases else []
        except _CaseFailed as failure:
            raise RewardError(
                f"reward {name!r} failed for {failure.case}: {failure}"
            ) from failure.__cause__
        except RewardError as error:
            raise RewardError(f"reward {name!r}: {error}") from error
        except OutOfTime as error:
            raise RewardError(
                f"reward {name!r} took longer than its timeout for {len(cases)} answers, the first "
                f"of them {cases[0]}{origin_in(error)}; raise it, or fix the function"
            ) from error
        except (Exception, SystemExit) as error:
            raise RewardError(
                f"reward {name!r} failed for {len(cases)} answers, the first of them {cases[0]}: "
                f"{_describe(error)}"
            ) from error
        if not hasattr(scores, "__len__") or len(scores) != len(cases):
            count = len(scores) if hasattr(scores, "__len__") else f"a {type(scores).__name__}"
            raise RewardError(f"reward {name!r} gave {count} scores for {len(cases)} answers")
        return [_number(s, case, name) for s, case in zip(scores, cases, strict=True)]

    def _scatter(
        self, tokens: TokenBatch, cases: Sequence[Case], scores: Sequence[float | None]
    ) -> Scores:
        """Scores by batch row `[B]`; padding rows have 0 and a False mask."""
        count = len(local_rows(tokens.loss_mask))
        values = np.zeros(count, np.float32)
        applies = np.zeros(count, np.bool_)
        for case, score in zip(cases, scores, strict=True):
            if score is not None:
                values[case.place], applies[case.place] = score, True
        return Scores(values, applies)


def text_reward(
    function: Callable[..., float | None],
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    name: str | None = None,
    with_prefill: bool = False,
    timeout: float | None = None,
) -> TextReward:
    """A reward computed from text: `function(prompt, completion)` or `(prompt, completion, row)`.

    Both texts are decoded without special tokens. The function runs in Python, one answer at a
    time; an exception, or a score that is not a finite number, stops the run.

    The data row is passed to a parameter named `row`, or to a third parameter without a default. If
    there are no rows, a `row` parameter with a default keeps its default.

    Args:
      function: returns a number, or None if it does not apply (see `combine_rewards`).
      tok: the policy's tokenizer.
      rows: the data rows: the result of `prompt_batches` (or its `examples`), or dicts in the order
        of `PromptBatch.index`. A row is a dict of all columns.
      name: the reward's name in errors; None: the function's name.
      with_prefill: True: the completion includes the start of the answer that the template wrote at
        the end of the prompt, such as `<think>`. False: only the policy's own text.
      timeout: seconds allowed per answer, see `jaxalign.data.time_limit`; None: no limit.

    Raises:
      ValueError: the function needs the row, and `rows` is None.
    """
    name = _name_of(function) if name is None else name
    parameter = _row_parameter(function)
    if rows is None and parameter is not None:
        if parameter.default is parameter.empty:
            raise ValueError(
                f"reward {name!r} takes the data row, and there are no rows; pass rows= (what "
                "prompt_batches gave)"
            )
        parameter = None

    def score_cases(cases: Sequence[Case]) -> list[float | None]:
        scores = []
        for case in cases:
            completion = case.prefilled + case.completion if with_prefill else case.completion
            args, kwargs = (case.prompt, completion), {}
            if parameter is not None and parameter.kind is parameter.KEYWORD_ONLY:
                kwargs = {parameter.name: case.row}
            elif parameter is not None:
                args += (case.row,)
            try:
                scores.append(call_within(timeout, function, *args, **kwargs))
            except (Exception, SystemExit, OutOfTime) as error:
                raise _CaseFailed(case, error, timeout) from error
        return scores

    return TextReward(score_cases, tok, rows, name, by_answer=True)


def batch_reward(
    function: Callable[..., Sequence[float | None]],
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    name: str | None = None,
    timeout: float | None = None,
) -> TextReward:
    """Scores all answers of a batch in one call, with the signature of TRL's reward functions.

    The call is `function(prompts=…, completions=…, **columns)`. Every argument is a list with one
    entry per answer. `columns` are the rows' columns except `prompt` and `completion`, with None
    for a row that lacks one. If the rows' prompts are lists of messages, `prompts` are too, and
    each completion is a list of one assistant message, as in TRL's GRPOTrainer; otherwise both are
    texts.

    Args:
      function: returns a list of numbers, with None where it does not apply.
      tok: the policy's tokenizer.
      rows: see `text_reward`; None: no columns.
      name: the reward's name in errors; None: the function's name.
      timeout: seconds allowed per call; None: no limit.
    """

    def score_cases(cases: Sequence[Case]) -> Sequence[float | None]:
        data = [case.row for case in cases if case.row is not None]
        columns = dict.fromkeys(key for row in data for key in row)
        values = {
            key: [row.get(key) for row in data]
            for key in columns
            if key not in ("prompt", "completion")
        }
        chat = bool(data) and all(isinstance(row.get("prompt"), list) for row in data)
        if chat:
            prompts: list[Any] = [row["prompt"] for row in data]
            completions: list[Any] = [
                [{"role": "assistant", "content": case.completion}] for case in cases
            ]
        else:
            prompts, completions = map(
                list, zip(*((c.prompt, c.completion) for c in cases), strict=True)
            )
        values |= {"prompts": prompts, "completions": completions}
        return call_within(timeout, lambda: function(**values))

    return TextReward(score_cases, tok, rows, _name_of(function) if name is None else name)


def _key(case: Case) -> tuple[int, str, str]:
    """What tells an answer of a batch: a row of data may be no key of a dict."""
    return case.place, case.prompt, case.completion


class _CaseFailed(Exception):
    """A reward function raised for one case."""

    def __init__(self, case: Case, error: BaseException, timeout: float | None):
        what = f"no score within timeout={timeout} s; raise it, or fix the function"
        out = isinstance(error, OutOfTime)
        super().__init__(f"{what}{origin_in(error)}" if out else _describe(error))
        self.case = case


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        # Left as an exit, it would end the run with the exit status of a finished run.
        return f"it called sys.exit({error.code!r}){origin_in(error)}"
    return f"{type(error).__name__}: {error}{origin_in(error)}"


def _row_parameter(function: Callable[..., Any]) -> inspect.Parameter | None:
    """The parameter that takes the data row, or None."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return None
    third = [p for p in parameters if p.kind in _POSITIONAL][2:3]
    if third and (third[0].name == "row" or third[0].default is inspect.Parameter.empty):
        return third[0]
    return next((p for p in parameters if p.name == "row" and p.kind is p.KEYWORD_ONLY), None)


def _name_of(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _number(score: Any, case: Case, name: str) -> float | None:
    if score is None:
        return None
    try:
        number = np.nan if isinstance(score, str) else float(score)
    except (TypeError, ValueError, OverflowError):
        number = np.nan
    if not abs(number) <= _LARGEST:  # nor NaN
        raise RewardError(
            f"reward {name!r} gave {_shown(score)} for {case}; wanted a finite number of at most "
            "3.4e38 (or None where it does not apply)"
        )
    return number


def _shown(score: Any) -> str:
    try:
        return repr(score)[:80]
    except ValueError:  # an integer of more than 4,300 digits
        return f"a number of {score.bit_length()} bits"


def scores_of(
    reward: Callable[[TokenBatch, PromptBatch], Any],
    tokens: TokenBatch,
    prompts: PromptBatch,
    name: str,
) -> Any:
    """The result of a reward: `Scores` with a mask for a text reward, otherwise as returned.

    Raises:
      RewardError: the reward failed; the message names it.
    """
    if isinstance(reward, TextReward):
        return reward.scores(tokens, prompts, name)
    try:
        return reward(tokens, prompts)
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward {name!r} failed: {_describe(error)}") from error
