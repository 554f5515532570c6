"""Best-of-n: several answers to a prompt, of which a reward model picks one.

Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325) and Nakano et al. 2021 (WebGPT,
https://arxiv.org/abs/2112.09332): better answers without training, at n times the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxalign.data.examples import Message
from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import Scorer
from jaxalign.rewards.scoring import score_conversations
from jaxalign.sampling.generate import generate
from jaxalign.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[Message]
Judge = Callable[[Sequence[list[Message]]], np.ndarray]
"""Conversations → their scores `[N]`, larger is better."""


class BestOfN(NamedTuple):
    """The answers to one prompt.

    Attributes:
      answer: the one with the highest score (the first of these, if there are several).
      score: its score.
      answers: all of them, as sampled.
      scores: of all of them.
    """

    answer: str
    score: float
    answers: tuple[str, ...]
    scores: tuple[float, ...]


def best_of(
    model: Decoder,
    params: Params,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    count: int = 4,
    **sampling: Any,
) -> list[BestOfN]:
    """Samples several answers to each prompt and picks the one that is judged best.

    Answers are judged as text, so that the judge may have another tokenizer and template. One that
    was cut off at `max_new_tokens` is judged as if it ended there, and an empty one is never picked
    unless all are empty.

    Args:
      model: the language model.
      params: its parameters.
      tok: its tokenizer.
      prompts: what the user says, or conversations that await an answer.
      judge: what scores conversations; see `model_judge`.
      count: n, answers a prompt.
      **sampling: as `jaxalign.generate`: temperature (above 0), max_new_tokens, key, ….

    Raises:
      ValueError: `count` below 1, or several answers at temperature 0, which would all be alike.
    """
    if count < 1:
        raise ValueError(f"count={count}: wanted at least one answer a prompt")
    if count > 1 and sampling.get("temperature", 1.0) <= 0:
        raise ValueError(
            f"temperature={sampling['temperature']} with {count} answers a prompt: greedy answers "
            "are all alike; give a temperature above 0"
        )
    texts = generate(model, params, tok, [p for p in prompts for _ in range(count)], **sampling)
    said = [
        [*_messages(prompts[i // count]), {"role": "assistant", "content": text}]
        for i, text in enumerate(texts)
    ]
    scores = np.full(len(texts), -np.inf)
    there = [i for i, text in enumerate(texts) if text.strip()]
    if there:
        scores[there] = judge([said[i] for i in there])
    picked = []
    for number in range(len(prompts)):
        own = slice(number * count, (number + 1) * count)
        answers, judged = tuple(texts[own]), tuple(scores[own].tolist())
        best = int(np.argmax(scores[own]))
        picked.append(BestOfN(answers[best], judged[best], answers, judged))
    return picked


def model_judge(
    scorer: Scorer,
    params: Params,
    tok: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    batch: int = 16,
) -> Judge:
    """A reward model as a judge.

    Args:
      scorer: a reward model with one score (`weigh_attributes` makes one of several).
      params: its parameters.
      tok: its own tokenizer.
      chat_template: what it was trained under; None is its tokenizer's.
      batch: answers scored at a time.
    """

    def judge(conversations: Sequence[list[Message]]) -> np.ndarray:
        return score_conversations(
            scorer, params, tok, conversations, batch=batch, chat_template=chat_template
        )

    return judge


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
