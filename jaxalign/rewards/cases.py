"""Cases: the answers of a rollout as text, each with its prompt and its data row."""

from __future__ import annotations

import pathlib
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxalign.parallel.sharding import local_rows
from jaxalign.types import PromptBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxalign.data.examples import Messages, Tools

_HEAD = 60  # characters of a prompt shown in an error
_TAIL = 32  # tokens of a prompt that may hold the start of an answer
_MARK = r"\|?[\w:]*(?:think|reason|thought)[\w:]*\|?[>\]]"
_PREFILLED = re.compile(rf"[<\[]{_MARK}\s*(?:[<\[]/?{_MARK}\s*)?$", re.IGNORECASE)


class RewardError(ValueError, RuntimeError):
    """A reward failed or returned no valid score; the message names reward and row.

    Training stops, because an answer without a score must not be trained on as if its score were 0.
    """


class Case(NamedTuple):
    """One answer to score.

    Attributes:
      prompt: the policy's input, decoded without special tokens.
      completion: the policy's output, decoded the same way.
      place: index of the row in the batch.
      row: the data row with all its columns; None if the reward has no rows.
      messages: the messages of the prompt; None if the reward has no rows.
      origin: origin of the row (`file:line`), or its index.
      tools: functions that the prompt's messages may call.
      prefilled: the start of the answer that the template wrote into the prompt, such as `<think>`.
    """

    prompt: str
    completion: str
    place: int
    row: Mapping[str, Any] | None = None
    messages: Messages | None = None
    origin: str = ""
    tools: Tools = ()
    prefilled: str = ""

    def __str__(self) -> str:
        head = self.prompt if len(self.prompt) <= _HEAD else self.prompt[:_HEAD] + "…"
        where = f" ({self.origin})" if self.origin else ""
        return f"row {self.place} of the batch{where}, prompt {head!r}"


class Rows:
    """The data rows behind prompts, by `PromptBatch.index`.

    Args:
      rows: the result of `prompt_batches`, its `examples`, or dicts in the order of the indices;
        None: no rows.
    """

    def __init__(self, rows: Any = None):
        self._rows: Sequence[Any] | None = getattr(rows, "examples", rows)

    def all(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each row with its origin."""
        for number, row in enumerate(self._rows or ()):
            if isinstance(row, Mapping):
                yield f"row {number} of the data", row
            else:
                yield row.origin, row.row

    def fill(self, case: Case, index: int) -> Case:
        """Adds the data row to a case.

        Raises:
          RewardError: no row has this index.
        """
        if self._rows is None:
            return case
        if not 0 <= index < len(self._rows):
            raise RewardError(
                f"{case}: its index {index} is none of the {len(self._rows)} rows that the reward "
                "was given; pass rows=batches for the batches that the prompts came from"
            )
        row = self._rows[index]
        if isinstance(row, Mapping):
            return case._replace(row=row, origin=f"row {index} of the data")
        return case._replace(row=row.row, messages=row.messages, origin=row.origin, tools=row.tools)


def cases_of(
    tok: PreTrainedTokenizerBase, tokens: TokenBatch, prompts: PromptBatch, rows: Rows
) -> list[Case]:
    """The answers of a batch as text; padding rows are left out.

    Args:
      tok: the policy's tokenizer.
      tokens: prompts with answers `[B, T]`; `loss_mask` marks the answers.
      prompts: the prompts `[B, P]`.
      rows: the data rows.
    """
    arrays = (tokens.targets, tokens.loss_mask, prompts.tokens, prompts.mask, prompts.index)
    cases = []
    for place, (targets, answer_mask, prompt, prompt_mask, index) in enumerate(
        zip(*local_rows(arrays), strict=True)
    ):
        if answer_mask.any():
            ids = prompt[prompt_mask], targets[answer_mask]
            cases.append(case_of(tok, *ids, place, int(index), rows))
    return cases


def case_of(
    tok: PreTrainedTokenizerBase, prompt: Any, answer: Any, place: int, index: int, rows: Rows
) -> Case:
    """One answer as text.

    Args:
      tok: the policy's tokenizer.
      prompt, answer: token ids, int `[n]` each.
      place: the answer's row in the batch.
      index: the prompt's row of data.
      rows: the data rows.
    """
    read = str(tok.decode(prompt, skip_special_tokens=True))
    written = str(tok.decode(answer, skip_special_tokens=True))
    case = Case(read, written, place, prefilled=prefilled(tok, prompt))
    return rows.fill(case, index)


def prefilled(tok: PreTrainedTokenizerBase, prompt: Any) -> str:
    """The start of an answer that a prompt ends with: an open, or empty, block of reasoning.

    Args:
      tok: a transformers tokenizer.
      prompt: token ids.
    """
    end = str(tok.decode(prompt[-_TAIL:], skip_special_tokens=False))
    found = _PREFILLED.search(end)
    return found[0] if found else ""


def shifted(prompts: PromptBatch, by: int) -> PromptBatch:
    """The prompts with `index` increased by `by`, for a table with `by` other rows before them."""
    index: Any = prompts.index  # [B], -1 for padding rows
    return prompts._replace(index=index + by * (index >= 0))


def origin_in(error: BaseException) -> str:
    """` at file:line` of the innermost frame outside this package, for messages, or ""."""
    origin = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if pathlib.Path(name).parent != pathlib.Path(__file__).parent:
            origin = f" at {name}:{line}"
    return origin
