"""Encodes answers in steps of reasoning, with the position at which each step ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxalign.data.chat import plain_prompt
from jaxalign.data.examples import Conversation, RowError, Steps
from jaxalign.data.render import NONE
from jaxalign.data.tokens import end_id, plain_ids, tokenize
from jaxalign.data.writers import Style, Writers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedSteps(NamedTuple):
    """An answer in steps as tokens.

    Attributes:
      ids: int32 `[n]`, prompt and answer.
      trained: bool `[n]`, the answer.
      ends: int32 `[steps]`, the index in `ids` of each step's last token.
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray


def encode_steps(
    tok: PreTrainedTokenizerBase,
    examples: Sequence[Steps],
    chat_template: str | None = None,
    separator: str = "\n",
    *,
    style: Style | None = None,
) -> list[EncodedSteps]:
    """Tokens of answers in steps, and where each step ends.

    A step ends at the token of its last character; the token may also hold the start of the
    separator.

    Args:
      tok: a fast transformers tokenizer.
      examples: prompts with steps.
      chat_template: see `jaxalign.data.chat.encode_conversations`. Under "none" the prompt and each
        step are tokenised separately: [bos] prompt step separator step … eos.
      separator: the text between two steps.
      style: see `encode_conversations`.

    Raises:
      ValueError: as `encode_conversations`; or the template changes the steps.
    """
    writers = Writers(tok, chat_template, style if style is not None else Style())
    if writers.template == NONE:
        return [_plain(tok, example, separator) for example in examples]
    return list(_templated(examples, writers, separator))


def _templated(
    examples: Sequence[Steps], writers: Writers, separator: str
) -> Iterator[EncodedSteps]:
    for example in examples:
        answer = {"role": "assistant", "content": separator.join(example.steps)}
        first = len(example.prompt)
        conversation = Conversation(
            (*example.prompt, answer),
            example.origin,
            first,
            template_kwargs=example.template_kwargs,
        )
        document = writers.texts(conversation, one_each=True)[0]
        ids, begins, tails = writers.places(document)
        ((first, last),) = document.spans
        trained = (begins < last) & (tails > first)
        ends, at = [], first
        for number, step in enumerate(example.steps):
            step = writers.special.hide(step) if step not in document.text else step
            at = document.text.find(step.strip(), at, last)
            if at < 0:
                raise RowError(
                    example.origin,
                    "the chat template changes the steps",
                    f"completions[{number}]: is not found in what the chat template writes; pass "
                    "another chat_template",
                )
            at += len(step.strip())
            ends.append(int(np.searchsorted(begins, at)) - 1)
        yield EncodedSteps(np.asarray(ids, np.int32), trained, np.asarray(ends, np.int32))


def _plain(tok: PreTrainedTokenizerBase, example: Steps, separator: str) -> EncodedSteps:
    ids = plain_ids(tok, [plain_prompt(example.prompt, example.origin)])[0]
    first = len(ids)
    ends = []
    for number, step in enumerate(example.steps):
        if number:
            ids = ids + tokenize(tok, [separator])["input_ids"][0]
        ids = ids + tokenize(tok, [step])["input_ids"][0]
        ends.append(len(ids) - 1)
    whole = np.asarray([*ids, end_id(tok)], np.int32)
    return EncodedSteps(whole, np.arange(len(whole)) >= first, np.asarray(ends, np.int32))
