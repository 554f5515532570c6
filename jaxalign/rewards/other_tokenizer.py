"""The score of a reward model that has a tokenizer and a chat template of its own.

Prompt and answer go through text: the answer is decoded with the policy's tokenizer and put after
the turns of its row of data, the conversation is rendered under the reward model's template and
tokenised with its tokenizer, and the score is read where the template ends the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxalign.models.lm_head import Scorer, pooled_scores
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
    """The score `(r − shift) / scale` of a reward model with another tokenizer than the policy's.

    An answer that was cut off at `max_new_tokens` is judged as if it ended there. A conversation of
    more than `length` tokens loses its start, so that the score is still read at the answer's end.
    Special tokens of the reward model that the policy has spelt out as text are taken out of the
    answer, which could otherwise end its turn and speak for the user. Both are counted and printed.

    Conversations of similar length are scored together, in widths of which there are few (32, 48,
    64, 96, …), so that there is little padding and few compilations.

    Args:
      scorer: a reward model with one score.
      params: its parameters, used where they lie.
      scorer_tok: its tokenizer, fast.
      tok: the policy's tokenizer.
      rows: the rows behind the prompts, with their messages; see `jaxalign.rewards.text_reward`.
      chat_template: what the reward model was trained under; see
        `jaxalign.data.resolve_chat_template`. None: its tokenizer's.
      length: tokens of the longest conversation; None: what the model was trained for.
      batch: conversations scored at a time.
      shift: mean score of reference answers, so that they score 0.
      scale: their standard deviation; > 0.
      name: how the reward is called in what is printed and in errors.

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
    # Not those that are words to the model, such as <think>.
    special = [one.content for one in scorer_tok.added_tokens_decoder.values() if one.special]

    @jax.jit
    def score(params: Params, tokens: TokenBatch) -> jax.Array:
        return (pooled_scores(scorer, on_device(params), tokens) - shift) / scale

    def judge(cases: Sequence[Case]) -> list[float]:
        from jaxalign.data.packing import bucket, token_rows

        said = [_without(special, case.completion) for case in cases]
        documents = _encode(scorer_tok, cases, said, chat_template)
        spelt = sum(one != case.completion for one, case in zip(said, cases, strict=True))
        cut = sum(len(one.ids) > longest for one in documents)
        if spelt or cut:
            print(
                f"reward {name!r}: of {len(cases)} conversations, {cut} were longer than {longest} "
                f"tokens and lost their start, and {spelt} answers lost special tokens of the "
                "reward model that they spelt out"
            )
        kept = [type(one)(one.ids[-longest:], one.trained[-longest:]) for one in documents]
        mesh = mesh_of(params)
        if mesh is not None and not rows_sharding(mesh).is_fully_addressable:
            raise RewardError(
                f"a reward model with another tokenizer on {jax.process_count()} processes: wanted "
                "one, as each would rebuild its own conversations; serve it (http) instead"
            )
        shards = 1 if mesh is None else row_shards(mesh)
        size = -(-batch // shards) * shards
        order = sorted(range(len(kept)), key=lambda i: -len(kept[i].ids))
        asked = []
        for start in range(0, len(order), size):
            group = order[start : start + size]
            width = min(bucket(len(kept[group[0]].ids)), longest)
            tokens = token_rows(kept, [[i] for i in group], size, width, 0)
            with use_mesh(mesh):
                tokens = tokens if mesh is None else shard_batch(tokens, mesh)
                asked.append((group, score(params, tokens)))
        found = np.zeros(len(kept))
        for group, scores in asked:
            found[group] = np.asarray(scores)[: len(group)]
        return found.tolist()

    return TextReward(judge, tok, rows, name)


def _encode(
    tok: PreTrainedTokenizerBase, cases: Sequence[Case], said: Sequence[str], template: str | None
) -> list[Any]:
    """Each conversation's tokens, up to the end of its answer."""
    from jaxalign.data.chat import Encoded, encode_conversations
    from jaxalign.data.examples import Conversation

    talks = []
    for case, answer in zip(cases, said, strict=True):
        if case.messages is None:
            raise RewardError(
                f"{case}: its row is a plain dict; wanted what prompt_batches gave, with messages"
            )
        turns = (*case.messages, {"role": "assistant", "content": answer})
        talks.append(Conversation(turns, case.origin, len(case.messages)))
    documents = []
    for one in encode_conversations(tok, talks, template):
        last = int(np.flatnonzero(one.trained)[-1]) + 1
        documents.append(Encoded(one.ids[:last], one.trained[:last]))
    return documents


def _without(special: Sequence[str], text: str) -> str:
    """The text without any special token, whatever taking one out puts together."""
    before = None
    while before != text:
        before = text
        for token in special:
            text = text.replace(token, "")
    return text
