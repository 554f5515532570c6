"""Answers in steps of reasoning to tokens, with the place where each step ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxalign.data.chat import end_id, plain_ids, plain_prompt, tokenize, tokens_with_places
from jaxalign.data.examples import Conversation, RowError, Steps
from jaxalign.data.render import NONE, Renderer, resolve_chat_template
from jaxalign.data.spans import find_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EncodedSteps(NamedTuple):
    """An answer in steps as tokens.

    Attributes:
      ids: int32 `[n]`, prompt and answer.
      trained: bool `[n]`, the answer.
      ends: int32 `[steps]`, where the last token of each step is in `ids`.
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray


def encode_steps(
    tok: PreTrainedTokenizerBase,
    examples: Sequence[Steps],
    chat_template: str | None = None,
    separator: str = "\n",
) -> list[EncodedSteps]:
    """Tokens of answers in steps, and where each step ends.

    A step ends in the token of its last character, which may hold the separator's first too.

    Args:
      tok: a fast transformers tokenizer.
      examples: prompts with steps.
      chat_template: see `jaxalign.data.chat.encode_conversations`. Under "none" the prompt and each
        step are tokenised apart: [bos] prompt step separator step … eos.
      separator: what is written between two steps.

    Raises:
      ValueError: as `encode_conversations`; or the template changes the steps.
    """
    template = resolve_chat_template(tok, chat_template)
    if template == NONE:
        return [_plain(tok, example, separator) for example in examples]
    return list(_templated(tok, examples, Renderer(tok, template), separator))


def _templated(
    tok: PreTrainedTokenizerBase, examples: Sequence[Steps], render: Renderer, separator: str
) -> Iterator[EncodedSteps]:
    talks = []
    for prompt, steps, _, origin, kwargs in examples:
        answer = {"role": "assistant", "content": separator.join(steps)}
        talks.append(Conversation((*prompt, answer), origin, len(prompt), template_kwargs=kwargs))
    documents = find_documents(render, talks, one_each=True)
    tokens = tokenize(tok, [document.text for document in documents])
    for example, document, ids, encoding in zip(
        examples, documents, tokens["input_ids"], tokens.encodings, strict=True
    ):
        ids, begins, tails = tokens_with_places(tok, document, ids, encoding)
        ((first, last),) = document.spans
        trained = (begins < last) & (tails > first)
        ends, at = [], first
        for number, step in enumerate(example.steps):
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
