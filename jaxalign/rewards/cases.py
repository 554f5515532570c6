"""Cases: the answers of a rollout as text, each with its prompt and the row of data behind it."""

from __future__ import annotations

import pathlib
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxalign.parallel.sharding import local_rows
from jaxalign.types import PromptBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxalign.data.examples import Messages

_HEAD = 60  # characters of a prompt shown in an error


class RewardError(ValueError, RuntimeError):
    """A reward failed, or gave something that is no score. The message names reward and row.

    Training stops: an answer whose reward is not known must not look like one that is worth 0.
    """


class Case(NamedTuple):
    """One answer to be judged.

    Attributes:
      prompt: what the policy read, special tokens left out.
      completion: what it wrote, likewise.
      place: row of the batch.
      row: the row of data, all its columns; None where no rows were given.
      messages: the turns of the prompt; None where no rows were given.
      origin: where the row came from (`file:line`), or its number.
    """

    prompt: str
    completion: str
    place: int
    row: Mapping[str, Any] | None = None
    messages: Messages | None = None
    origin: str = ""

    def __str__(self) -> str:
        head = self.prompt if len(self.prompt) <= _HEAD else self.prompt[:_HEAD] + "…"
        where = f" ({self.origin})" if self.origin else ""
        return f"row {self.place} of the batch{where}, prompt {head!r}"


class Rows:
    """The rows of data behind prompts, by `PromptBatch.index`.

    Args:
      rows: what `prompt_batches` gave, its `examples`, or rows as dicts in the order of the
        indices; None: there are none.
    """

    def __init__(self, rows: Any = None):
        self._rows: Sequence[Any] | None = getattr(rows, "examples", rows)

    def all(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Each row with where it came from."""
        for number, found in enumerate(self._rows or ()):
            if isinstance(found, Mapping):
                yield f"row {number} of the data", found
            else:
                yield found.origin, found.row

    def fill(self, case: Case, index: int) -> Case:
        """The case with its row.

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
        found = self._rows[index]
        if isinstance(found, Mapping):
            return case._replace(row=found, origin=f"row {index} of the data")
        return case._replace(row=found.row, messages=found.messages, origin=found.origin)


def cases_of(
    tok: PreTrainedTokenizerBase, tokens: TokenBatch, prompts: PromptBatch, rows: Rows
) -> list[Case]:
    """The answers of a batch as text, but for rows that only fill it up.

    Args:
      tok: the policy's tokenizer.
      tokens: prompts with answers, `loss_mask` on the answers.
      prompts: the prompts.
      rows: where their rows are.
    """
    # Answer by answer: texts of special tokens are left out, and masks say where each begins.
    arrays: Any = (tokens.targets, tokens.loss_mask, prompts.tokens, prompts.mask, prompts.index)
    said = [
        (place, index, prompt[there], targets[answer])
        for place, (targets, answer, prompt, there, index) in enumerate(
            zip(*local_rows(arrays), strict=True)
        )
        if answer.any()
    ]
    decode = lambda which: [  # noqa: E731
        str(tok.decode(each[which], skip_special_tokens=True)) for each in said
    ]
    return [
        rows.fill(Case(prompt, completion, place), int(index))
        for (place, index, *_), prompt, completion in zip(said, decode(2), decode(3), strict=True)
    ]


def shifted(prompts: PromptBatch, by: int) -> PromptBatch:
    """The prompts with indices into a longer table, whose first `by` rows are of other data."""
    index: Any = prompts.index
    return prompts._replace(index=index + by * (index >= 0))


def origin_in(error: BaseException) -> str:
    """` at file:line` of the innermost frame outside this package, for messages; "" if none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if pathlib.Path(name).parent != pathlib.Path(__file__).parent:
            found = f" at {name}:{line}"
    return found
