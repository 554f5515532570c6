"""Best-of-n sampling: samples n answers to a prompt and returns the best by a reward model.

Stiennon et al. 2020 (https://arxiv.org/abs/2009.01325) and Nakano et al. 2021 (WebGPT,
https://arxiv.org/abs/2112.09332): better answers without training, at n times the sampling cost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxalign.data.examples import Message
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.rewards.scoring import score_conversations
from jaxalign.sampling.generate import generate
from jaxalign.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[Message]
ConversationScorer = Callable[[Sequence[list[Message]]], np.ndarray]
"""Conversations → scores `[N]`; larger is better."""


class BestOfN(NamedTuple):
    """The result for one prompt.

    Attributes:
      answer: the answer with the highest score; on a tie, the first.
      score: its score.
      answers: all answers, in the order of sampling.
      scores: their scores.
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
    judge: ConversationScorer,
    *,
    count: int = 4,
    **sampling: Any,
) -> list[BestOfN]:
    """Samples `count` answers to each prompt and selects the one with the highest score.

    Answers are scored as text, so the judge may have another tokenizer and template. An answer cut
    off at `max_new_tokens` is scored as if it ended there. An empty answer is selected only if all
    answers are empty.

    Args:
      model: the language model.
      params: its parameters.
      tok: its tokenizer.
      prompts: user messages, or conversations that end before the answer.
      judge: scores conversations; see `model_judge`.
      count: n, answers per prompt.
      **sampling: options of `jaxalign.generate`: temperature (above 0), max_new_tokens, key, ….

    Raises:
      ValueError: `count` below 1, or several answers at temperature 0, which would be equal.
    """
    if count < 1:
        raise ValueError(f"count={count}: wanted at least one answer a prompt")
    if count > 1 and sampling.get("temperature", 1.0) <= 0:
        raise ValueError(
            f"temperature={sampling['temperature']} with {count} answers a prompt: greedy answers "
            "are all alike; give a temperature above 0"
        )
    texts = generate(model, params, tok, [p for p in prompts for _ in range(count)], **sampling)
    conversations = [
        [*_messages(prompts[i // count]), {"role": "assistant", "content": text}]
        for i, text in enumerate(texts)
    ]
    scores = np.full(len(texts), -np.inf)
    nonempty = [i for i, text in enumerate(texts) if text.strip()]
    if nonempty:
        scores[nonempty] = judge([conversations[i] for i in nonempty])
    results = []
    for number in range(len(prompts)):
        part = slice(number * count, (number + 1) * count)
        answers, answer_scores = tuple(texts[part]), tuple(scores[part].tolist())
        best = int(np.argmax(scores[part]))
        results.append(BestOfN(answers[best], answer_scores[best], answers, answer_scores))
    return results


def model_judge(
    scorer: Scorer,
    params: Params,
    tok: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    batch: int = 16,
) -> ConversationScorer:
    """A reward model as the judge of `best_of`: conversations → scores `[N]`.

    Args:
      scorer: a reward model with one score (`weigh_attributes` reduces several to one).
      params: its parameters.
      tok: its own tokenizer.
      chat_template: the template it was trained with; None: its tokenizer's.
      batch: answers per forward pass.
    """

    def judge(conversations: Sequence[list[Message]]) -> np.ndarray:
        return score_conversations(
            scorer, params, tok, conversations, batch=batch, chat_template=chat_template
        )

    return judge


def _messages(prompt: Prompt) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
