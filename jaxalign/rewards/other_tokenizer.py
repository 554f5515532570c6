"""The reward of a model with its own tokenizer and chat template.

Prompt and answer pass through text:

1. the policy's tokenizer decodes the answer, which is appended to the messages of its data row;
2. the reward model's template renders the conversation, and its tokenizer encodes it;
3. the score is read at the token with which the template ends the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxalign.models.scorer import Scorer, pooled_scores
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, row_shards, rows_sharding, shard_batch, use_mesh
from jaxalign.rewards.cases import Case, RewardError
from jaxalign.rewards.model import check_scale
from jaxalign.rewards.text import TextReward
from jaxalign.types import Params, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def retokenised_reward(
    scorer: Scorer,
    params: Params,
    scorer_tok: PreTrainedTokenizerBase,
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any,
    chat_template: str | None = None,
    length: int | None = None,
    batch: int = 16,
    shift: float = 0.0,
    scale: float = 1.0,
    name: str = "model",
) -> TextReward:
    """The reward of a model with another tokenizer than the policy's, shifted and scaled.

        (r − shift) / scale

    - An answer cut off at `max_new_tokens` is scored as if it ended there.
    - A conversation of more than `length` tokens loses its start: the score belongs to the answer's
      end. The number of such conversations is printed.
    - Special tokens of the reward model that the policy wrote as text are removed from the answer.
      They could end its turn and speak for the user. The number of such answers is printed.

    Conversations of similar length share a batch, padded to one of few widths (32, 48, 64, 96, …),
    so that there is little padding and few compilations.

    Args:
      scorer: a reward model with one score.
      params: its parameters; the model runs on their devices.
      scorer_tok: its (fast) tokenizer.
      tok: the policy's tokenizer.
      rows: the data rows behind the prompts, with messages; see `jaxalign.rewards.text_reward`.
      chat_template: the template that the reward model was trained with; see
        `jaxalign.data.resolve_chat_template`. None: its tokenizer's.
      length: maximum tokens of a conversation; None: the model's maximum.
      batch: conversations per forward pass.
      shift: mean score of reference answers, so that they score 0.
      scale: standard deviation of their scores; > 0.
      name: the reward's name in errors and messages.

    Raises:
      ValueError: a reward model with several scores, no rows, or numbers out of range.
    """
    check_scale(scale)
    if len(scorer.attributes) > 1:
        raise ValueError(
            f"reward {name!r}: the model has the attributes {', '.join(scorer.attributes)} and no "
            "single score; say how much each counts (weigh_attributes)"
        )
    longest = scorer.config.max_positions if length is None else length
    if longest < 2 or batch < 1:
        raise ValueError(f"reward {name!r} length={length}, batch={batch}: wanted positive numbers")
    if rows is None:
        raise ValueError(
            f"reward {name!r} rebuilds conversations, and there are no rows; pass rows= (what "
            "prompt_batches gave)"
        )
    # Added tokens that are not special, such as <think>, are ordinary text for the model.
    special = [token.content for token in scorer_tok.added_tokens_decoder.values() if token.special]

    @jax.jit
    def score(params: Params, tokens: TokenBatch) -> jax.Array:
        return (pooled_scores(scorer, on_device(params), tokens) - shift) / scale

    def score_cases(cases: Sequence[Case]) -> list[float]:
        from jaxalign.data.packing import bucket, token_rows

        answers = [_remove_tokens(special, case.completion) for case in cases]
        documents = _encode(scorer_tok, cases, answers, chat_template)
        spelt = sum(a != case.completion for a, case in zip(answers, cases, strict=True))
        cut = sum(len(document.ids) > longest for document in documents)
        if spelt or cut:
            print(
                f"reward {name!r}: of {len(cases)} conversations, {cut} were longer than {longest} "
                f"tokens and lost their start, and {spelt} answers lost special tokens of the "
                "reward model that they spelt out"
            )
        documents = [type(d)(d.ids[-longest:], d.trained[-longest:]) for d in documents]
        mesh = mesh_of(params)
        if mesh is not None and not rows_sharding(mesh).is_fully_addressable:
            raise RewardError(
                f"a reward model with another tokenizer on {jax.process_count()} processes: wanted "
                "one, as each would rebuild its own conversations; serve it (http) instead"
            )
        shards = 1 if mesh is None else row_shards(mesh)
        size = -(-batch // shards) * shards
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i].ids))
        dispatched = []
        for start in range(0, len(order), size):
            group = order[start : start + size]
            width = min(bucket(len(documents[group[0]].ids)), longest)
            tokens = token_rows(documents, [[i] for i in group], size, width, 0)
            with use_mesh(mesh):
                tokens = tokens if mesh is None else shard_batch(tokens, mesh)
                dispatched.append((group, score(params, tokens)))
        scores = np.zeros(len(documents))
        for group, values in dispatched:
            scores[group] = np.asarray(values)[: len(group)]
        return scores.tolist()

    return TextReward(score_cases, tok, rows, name)


def _encode(
    tok: PreTrainedTokenizerBase,
    cases: Sequence[Case],
    answers: Sequence[str],
    template: str | None,
) -> list[Any]:
    """The tokens of each conversation, up to the end of its answer."""
    from jaxalign.data.chat import Encoded, encode_conversations
    from jaxalign.data.examples import Conversation

    conversations = []
    for case, answer in zip(cases, answers, strict=True):
        if case.messages is None:
            raise RewardError(
                f"{case}: its row is a plain dict; wanted what prompt_batches gave, with messages"
            )
        messages = (*case.messages, {"role": "assistant", "content": answer})
        first = len(case.messages)
        conversations.append(Conversation(messages, case.origin, first, case.tools))
    documents = []
    for document in encode_conversations(tok, conversations, template):
        end = int(np.flatnonzero(document.trained)[-1]) + 1
        documents.append(Encoded(document.ids[:end], document.trained[:end]))
    return documents


def _remove_tokens(special: Sequence[str], text: str) -> str:
    """Removes special tokens until none is left: removing one may join the halves of another."""
    previous = None
    while previous != text:
        previous = text
        for token in special:
            text = text.replace(token, "")
    return text
