"""Scores of answers by a reward model, for rows of any form that has answers.

| row | what its score is |
| --- | --- |
| conversation, prompt and completion, graded answer | a number |
| preference | `chosen`, `rejected`, `margin` (their difference) |
| several answers (`answers`, or `completions` with ranks) | a list of numbers |
| steps (`steps`, or `completions` with `labels`) | `steps`: probabilities; their `product`, `min` |

A reward model with attributes gives an object of numbers, one an attribute, in place of a number.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxalign.data import encode_conversations, encode_steps
from jaxalign.data.chat import Encoded
from jaxalign.data.examples import Conversation, Message, Steps
from jaxalign.data.fields import fail, short
from jaxalign.data.messages import read_messages
from jaxalign.data.packing import bucket, token_rows
from jaxalign.data.rows import to_conversation, to_preference, to_ranked, to_steps
from jaxalign.data.sources import Row, read_rows
from jaxalign.hf import load_pretrained, load_tokenizer
from jaxalign.models.lm_head import Scorer, weigh_attributes
from jaxalign.rewards.evaluation import wilson
from jaxalign.types import Params, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = float | dict[str, float]


class Answers(NamedTuple):
    """What a row gives to score.

    Attributes:
      conversations: prompts with answers.
      tell: outputs `[A]` at the end of each → what is said about the row.
      steps: whether every step is scored; the one conversation's answer is then in `texts`.
      texts: the steps.
    """

    conversations: tuple[Conversation, ...]
    tell: Callable[[list[np.ndarray]], Any]
    texts: tuple[str, ...] = ()


class Scored(NamedTuple):
    """The scores of rows.

    Attributes:
      results: what the table above says, one a row.
      cut: answers that were longer than the longest allowed, and scored without their end.
      right: pairs whose chosen answer scores higher, of `pairs`; (0, 0) where there are none.
    """

    results: list[Any]
    cut: int
    right: tuple[int, int]


def score_rows(
    scorer: Scorer,
    params: Params,
    tok: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    *,
    batch: int = 16,
    length: int | None = None,
    chat_template: str | None = None,
) -> Scored:
    """Scores rows, each by its form.

    Args:
      scorer: the reward model.
      params: its parameters.
      tok: its tokenizer.
      rows: as `jaxalign.data.read_rows` gives them.
      batch: answers scored at a time.
      length: tokens of the longest prompt with answer; those beyond lose their end, as in training.
        None: as long as the longest is.
      chat_template: see `jaxalign.data.resolve_chat_template`.

    Raises:
      ValueError: a row without an answer, or of no known form (`file:line`); steps for a reward
        model with several outputs, or that are too long.
    """
    answers = [_answers(row, scorer.attributes) for row in rows]
    documents: list[Encoded] = []
    ends: list[list[int]] = []
    plain = [each for each in answers if not each.texts]
    whole = iter(
        encode_conversations(
            tok, [one for each in plain for one in each.conversations], chat_template
        )
    )
    for row, each in zip(rows, answers, strict=True):
        if each.texts:
            document, places = _encode_steps(tok, each, row, chat_template)
            if length is not None and len(document.ids) > length:
                raise ValueError(
                    f"{row.origin}: the steps end beyond length={length}, at "
                    f"{len(document.ids)} tokens; give a larger length"
                )
            documents.append(document)
            ends.append(places)
            continue
        for document in itertools.islice(whole, len(each.conversations)):
            # What a template writes after the last answer was not there in training.
            last = int(np.flatnonzero(document.trained)[-1])
            documents.append(Encoded(document.ids[: last + 1], document.trained[: last + 1]))
            ends.append([last])
    outputs, cut = _outputs_at(scorer, params, documents, ends, batch, length)
    results, place = [], iter(outputs)
    right = pairs = 0
    for each in answers:
        own = list(itertools.islice(place, len(each.conversations)))
        result = each.tell(list(own[0]) if each.texts else [one[0] for one in own])
        results.append(result)
        if isinstance(result, dict) and isinstance(result.get("margin"), float):
            pairs += 1
            right += result["margin"] > 0
    return Scored(results, cut, (right, pairs))


def score_conversations(
    scorer: Scorer,
    params: Params,
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Message]],
    *,
    batch: int = 16,
    chat_template: str | None = None,
) -> np.ndarray:
    """Scores of whole conversations, each read at the end of its last answer: float32 `[N]`.

    Args:
      scorer: a reward model with one score.
      params: its parameters.
      tok: its tokenizer.
      conversations: lists of messages; the last is the assistant's.
      batch: how many are scored at a time.
      chat_template: see `jaxalign.data.resolve_chat_template`.

    Raises:
      ValueError: no answer to score, or a reward model with several attributes.
    """
    if len(scorer.attributes) > 1:
        raise ValueError(
            f"the reward model has the attributes {', '.join(scorer.attributes)} and no single "
            "score; say how much each counts (weigh_attributes)"
        )
    checked = [
        read_messages(list(said), "messages", f"conversation {number + 1}")
        for number, said in enumerate(conversations)
    ]
    rows = [
        Row({"messages": list(said)}, f"conversation {number + 1}")
        for number, said in enumerate(checked)
    ]
    bare = Scorer(scorer.base)
    scored = score_rows(bare, params, tok, rows, batch=batch, chat_template=chat_template)
    return np.asarray(scored.results, np.float32)


def load_scorer(
    source: str, weights: Mapping[str, float] | None = None
) -> tuple[Scorer, Params, PreTrainedTokenizerBase]:
    """A reward model with its tokenizer, on the default device.

    Args:
      source: folder or hub id.
      weights: attribute → weight, for one score; see `jaxalign.models.lm_head.weigh_attributes`.

    Raises:
      ValueError: a language model without a score, or weights that do not fit.
    """
    tok = load_tokenizer(source)
    model, params = load_pretrained(source)
    if not isinstance(model, Scorer):
        raise ValueError(
            f"{source!r} is a language model without a score; wanted a reward model, as "
            "`jaxalign reward` makes"
        )
    if weights is not None:
        model, params = weigh_attributes(model, params, weights)
    return model, params, tok


def score_files(
    source: str,
    files: Sequence[str],
    out: str | None = None,
    *,
    column: str = "reward",
    weights: Mapping[str, float] | None = None,
    batch: int = 16,
    length: int | None = None,
    chat_template: str | None = None,
) -> str:
    """Writes every row of some files with its score, one JSON object a line, in their order.

    Args:
      source: reward model, folder or hub id.
      files: as `jaxalign.data.read_rows` takes them.
      out: file to write; None: standard output.
      column: name of the column that is added; no row may have it.
      weights: see `load_scorer`.
      batch: answers scored at a time.
      length: tokens of the longest prompt with answer.
      chat_template: see `jaxalign.data.resolve_chat_template`.

    Returns:
      What was scored and cut, in a sentence, with the accuracy where rows are pairs.

    Raises:
      ValueError: as `score_rows`; a row that has the column already.
    """
    rows = read_rows(list(files))
    taken = next((row.origin for row in rows if column in row.data), None)
    if taken is not None:
        raise ValueError(f"{taken}: the row has a column {column!r} already; choose another name")
    scorer, params, tok = load_scorer(source, weights)
    scored = score_rows(
        scorer, params, tok, rows, batch=batch, length=length, chat_template=chat_template
    )
    with contextlib.ExitStack() as stack:
        if out is None:
            file = sys.stdout
        else:
            path = pathlib.Path(out)
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w", encoding="utf-8"))
        for row, result in zip(rows, scored.results, strict=True):
            file.write(json.dumps({**row.data, column: result}, ensure_ascii=False) + "\n")
    told = [f"{len(rows)} rows scored, {scored.cut} answers cut"]
    right, pairs = scored.right
    if pairs:
        low, high = wilson(right, pairs)
        told.append(
            f"{right / pairs:.3f} of {pairs} pairs ranked right (95 % interval {low:.3f} to "
            f"{high:.3f})"
        )
    return "; ".join(told)


# --- rows ----------------------------------------------------------------------------------------


def _answers(row: Row, attributes: tuple[str, ...]) -> Answers:
    """The answers of a row, by its columns."""

    def said(outputs: np.ndarray) -> Score:
        if not attributes:
            return float(outputs[0])
        return dict(zip(attributes, map(float, outputs), strict=True))

    def of_pair(outputs: list[np.ndarray]) -> dict[str, Score]:
        chosen, rejected = outputs
        margin = chosen.astype(np.float64) - rejected.astype(np.float64)
        return {"chosen": said(chosen), "rejected": said(rejected), "margin": said(margin)}

    def of_steps(outputs: list[np.ndarray]) -> dict[str, Any]:
        right = 0.5 * (1 + np.tanh(np.array([one[0] for one in outputs], np.float64) / 2))
        return {
            "steps": right.tolist(),
            "product": float(right.prod()),
            "min": float(right.min()),
        }

    there = {name for name, value in row.data.items() if value is not None}
    if "steps" in there or {"completions", "labels"} <= there:
        if len(attributes) > 1:
            raise ValueError(
                f"{row.origin}: steps, but the reward model has the attributes "
                f"{', '.join(attributes)}; wanted one with a single output"
            )
        if "labels" not in there:
            row = _filled(row, "labels", row.data["steps"], 1.0)
        steps = to_steps(row)
        joined = {"role": "assistant", "content": "\n".join(steps.steps)}
        whole = Conversation((*steps.prompt, joined), row.origin, len(steps.prompt))
        return Answers((whole,), of_steps, steps.steps)
    if {"chosen", "rejected"} <= there or {"chosen_messages", "rejected_messages"} <= there:
        pair = to_preference(row)
        both = tuple(
            Conversation(pair.prompt + side, row.origin, len(pair.prompt), pair.tools)
            for side in (pair.chosen, pair.rejected)
        )
        return Answers(both, of_pair)
    if there & {"answers", "completions"}:
        if not there & {"scores", "ranks"}:
            key = "answers" if "answers" in there else "completions"
            row = _filled(row, "ranks", row.data[key], 1.0)
        ranked = to_ranked(row)
        several = tuple(
            Conversation(ranked.prompt + one, row.origin, len(ranked.prompt), ranked.tools)
            for one in ranked.answers
        )
        return Answers(several, lambda outputs: [said(one) for one in outputs])
    conversation = to_conversation(row)
    if conversation.messages[-1]["role"] != "assistant":
        fail(
            row.origin,
            "messages",
            f"a last turn of the {conversation.messages[-1]['role']}",
            "the assistant's answer, which is what is scored",
            "add it or remove the row",
        )
    # Whatever of it was to be trained: the score is read at the end of the last answer.
    last = len(conversation.messages) - 1
    return Answers(
        (conversation._replace(trained_from=last, untrained=()),), lambda outputs: said(outputs[0])
    )


def _filled(row: Row, column: str, like: Any, value: float) -> Row:
    """The row with numbers that its form has, but that scoring has no use for."""
    if not isinstance(like, list):
        fail(row.origin, column, short(like), "a list of answers or steps")
    return Row(row.data | {column: [value] * len(like)}, row.origin)


# --- tokens --------------------------------------------------------------------------------------


def _encode_steps(
    tok: PreTrainedTokenizerBase, answers: Answers, row: Row, chat_template: str | None
) -> tuple[Encoded, list[int]]:
    prompt = answers.conversations[0].messages[:-1]
    example = Steps(prompt, answers.texts, (1.0,) * len(answers.texts), row.origin)
    (encoded,) = encode_steps(tok, [example], chat_template)
    return Encoded(encoded.ids, encoded.trained), [int(end) for end in encoded.ends]


def _outputs_at(
    scorer: Scorer,
    params: Params,
    documents: Sequence[Encoded],
    ends: Sequence[Sequence[int]],
    batch: int,
    length: int | None,
) -> tuple[list[np.ndarray], int]:
    """The head's outputs at given tokens of each document, `[places, A]` each; how many were cut.

    Documents of similar length go together, in widths of which there are few, so that there is
    little padding and few compilations.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: wanted a positive number of answers at a time")
    if length is not None and length < 1:
        raise ValueError(f"length={length}: wanted a positive number of tokens")

    @jax.jit
    def run(params: Params, tokens: TokenBatch) -> jax.Array:
        hidden = scorer.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
        return scorer.outputs(params, hidden)

    sizes = [len(one.ids) for one in documents]
    kept = [size if length is None else min(size, length) for size in sizes]
    cut = sum(size > room for size, room in zip(sizes, kept, strict=True))
    shortened = [
        Encoded(one.ids[:room], one.trained[:room])
        for one, room in zip(documents, kept, strict=True)
    ]
    found: list[np.ndarray] = [np.zeros(0)] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: -kept[i])
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = bucket(kept[group[0]])
        tokens = token_rows(shortened, [[i] for i in group], batch, width, 0)
        outputs = np.asarray(run(params, tokens))
        for row, i in enumerate(group):
            places = np.minimum(np.asarray(ends[i]), kept[i] - 1)
            found[i] = outputs[row, places]
    return found, cut
