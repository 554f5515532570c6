"""Scores data rows with a reward model; a row's form determines the form of its score.

| row | score |
| --- | --- |
| conversation, prompt and completion, graded answer | a number |
| preference | `chosen`, `rejected`, `margin` (their difference) |
| several answers (`answers`, or `completions` with ranks) | a list of numbers |
| steps (`steps`, or `completions` with `labels`) | `steps`: probabilities; their `product`, `min` |

A reward model with attributes gives, in place of each number, an object with a number per
attribute.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from jaxalign.data import encode_conversations, encode_steps
from jaxalign.data.chat import Encoded
from jaxalign.data.examples import Conversation, Message, Steps
from jaxalign.data.extent import Limits, extent_of
from jaxalign.data.fields import fail, short
from jaxalign.data.messages import read_messages
from jaxalign.data.packing import bucket, token_rows
from jaxalign.data.paths import local_path
from jaxalign.data.rows import to_conversation, to_preference, to_ranked, to_steps
from jaxalign.data.sources import Row, read_rows
from jaxalign.data.writers import Style
from jaxalign.hf import load_reward_model, load_tokenizer
from jaxalign.hf.load import expect_reward_model
from jaxalign.hf.named_adapters import load_with_adapters
from jaxalign.models.scorer import Scorer, weigh_attributes
from jaxalign.rewards.evaluation import wilson
from jaxalign.types import Params, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Score = float | dict[str, float]


class Scorable(NamedTuple):
    """The answers of a row, and how their scores become the row's result.

    Attributes:
      conversations: prompts with answers; one for a row of steps.
      to_result: head outputs `[A]`, one per conversation (or per step) → the row's result.
      steps: texts of the steps, for a row whose steps are all scored.
    """

    conversations: tuple[Conversation, ...]
    to_result: Callable[[list[np.ndarray]], Any]
    steps: tuple[str, ...] = ()


class Scored(NamedTuple):
    """The scores of rows.

    Attributes:
      results: one per row, see the module's table.
      cut: the number of answers longer than `length`, which were scored without their end.
      right: (pairs whose chosen answer scores higher, all pairs); (0, 0) without pairs.
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
    thinking: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Scored:
    """Scores rows by their form.

    Args:
      scorer: the reward model.
      params: its parameters.
      tok: its tokenizer.
      rows: the result of `jaxalign.data.read_rows`.
      batch: answers per forward pass.
      length: maximum tokens of a prompt with its answer; longer ones lose their end, as in
        training. None: no limit.
      chat_template: see `jaxalign.data.resolve_chat_template`.
      thinking: "on", "off" or "auto": as in the reward model's training; see
        `jaxalign.data.options.BatchOptions`.
      chat_template_kwargs: variables of the template, as in its training.

    Raises:
      ValueError: a row without an answer, or of no known form (`file:line`); rows of steps that are
        too long, or for a reward model with several outputs.
    """
    scorables = [_scorable(row, scorer.attributes) for row in rows]
    style = Style(chat_template_kwargs, thinking=thinking)
    documents, ends = _encode(tok, rows, scorables, length, chat_template, style)
    outputs, cut = _outputs_at(scorer, params, documents, ends, batch, length)
    results, remaining = [], iter(outputs)
    right = pairs = 0
    for scorable in scorables:
        # One array [positions, A] per document; a row of steps has one document.
        arrays = list(itertools.islice(remaining, len(scorable.conversations)))
        scores = list(arrays[0]) if scorable.steps else [array[0] for array in arrays]
        result = scorable.to_result(scores)
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
    """Scores conversations, each at the end of its last answer.

    Args:
      scorer: a reward model with one score.
      params: its parameters.
      tok: its tokenizer.
      conversations: lists of messages; the last message is the assistant's.
      batch: conversations per forward pass.
      chat_template: see `jaxalign.data.resolve_chat_template`.

    Returns:
      Scores, float32 `[N]`.

    Raises:
      ValueError: a conversation without an answer, or a reward model with several attributes.
    """
    if len(scorer.attributes) > 1:
        raise ValueError(
            f"the reward model has the attributes {', '.join(scorer.attributes)} and no single "
            "score; say how much each counts (weigh_attributes)"
        )
    rows = []
    for number, messages in enumerate(conversations, 1):
        origin = f"conversation {number}"
        checked = read_messages(list(messages), "messages", origin)
        rows.append(Row({"messages": list(checked)}, origin))
    unnamed = Scorer(scorer.base)  # a single attribute's score as a number, not an object
    scored = score_rows(unnamed, params, tok, rows, batch=batch, chat_template=chat_template)
    return np.asarray(scored.results, np.float32)


def load_scorer(
    source: str, weights: Mapping[str, float] | None = None
) -> tuple[Scorer, Params, PreTrainedTokenizerBase]:
    """Loads a reward model and its tokenizer onto the default device.

    Args:
      source: folder or hub id.
      weights: attribute → weight, for one score; see `jaxalign.models.scorer.weigh_attributes`.

    Raises:
      ValueError: a language model without a score, or weights that do not fit.
    """
    tok = load_tokenizer(source)
    return *load_reward_model(source, weights), tok


def load_scorers(
    source: str, adapters: Mapping[str, str], weights: Mapping[str, float] | None = None
) -> list[tuple[Scorer, Params, PreTrainedTokenizerBase]]:
    """Loads reward models that are adapters on one base, which is in memory once.

    Args:
      source: the base: folder or hub id.
      adapters: name → folder of PEFT with a score head, or hub id.
      weights: as for `load_scorer`.

    Raises:
      ValueError: an adapter without a score on a language model; or as `load_adapter`.
    """
    found = []
    loaded = load_with_adapters(source, adapters)
    for name, folder in adapters.items():
        model, params, tok = loaded[name]
        scorer = expect_reward_model(model, folder, "adapter")
        if weights is not None:
            scorer, params = weigh_attributes(scorer, params, weights)
        found.append((scorer, params, tok))
    return found


def score_files(
    source: str,
    files: Sequence[str],
    out: str | None = None,
    *,
    adapters: Mapping[str, str] | None = None,
    column: str = "reward",
    weights: Mapping[str, float] | None = None,
    batch: int = 16,
    length: int | None = None,
    chat_template: str | None = None,
    thinking: str = "auto",
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """Scores the rows of files and writes each as a line of JSON with its score, in order.

    Args:
      source: reward model, folder or hub id; with adapters, their base.
      files: sources for `jaxalign.data.read_rows`.
      out: file to write; None: standard output.
      adapters: name → adapter on the model, which is in memory once. With several adapters, each
        has its own column, named `<column>_<name>`.
      column: name of the added column; no row may have it.
      weights: see `load_scorer`.
      batch: answers per forward pass.
      length: maximum tokens of a prompt with its answer.
      chat_template: see `jaxalign.data.resolve_chat_template`.
      thinking: see `score_rows`.
      chat_template_kwargs: see `score_rows`.

    Returns:
      A summary: rows scored, answers cut, and the accuracy on pairs, if there are any.

    Raises:
      ValueError: see `score_rows`; or a row that already has the column.
    """
    path = None if out is None else local_path(out, "out")
    rows = read_rows(list(files))
    names = list(adapters or {})
    columns = [f"{column}_{name}" for name in names] if len(names) > 1 else [column]
    taken = [(row.origin, name) for row in rows for name in columns if name in row.data]
    if taken:
        raise ValueError(
            f"{taken[0][0]}: the row has a column {taken[0][1]!r} already; choose another name"
        )
    scorers = (
        load_scorers(source, adapters, weights) if adapters else [load_scorer(source, weights)]
    )
    every = [
        score_rows(
            scorer,
            params,
            tok,
            rows,
            batch=batch,
            length=length,
            chat_template=chat_template,
            thinking=thinking,
            chat_template_kwargs=chat_template_kwargs,
        )
        for scorer, params, tok in scorers
    ]
    with contextlib.ExitStack() as stack:
        file = sys.stdout
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w", encoding="utf-8"))
        for row, *results in zip(rows, *(scored.results for scored in every), strict=True):
            added = dict(zip(columns, results, strict=True))
            file.write(json.dumps({**row.data, **added}, ensure_ascii=False) + "\n")
    if len(every) == 1:
        return _summary(every[0], len(rows))
    lines = zip(names, every, strict=True)
    return "\n".join(f"{name}: {_summary(scored, len(rows))}" for name, scored in lines)


def _summary(scored: Scored, rows: int) -> str:
    summary = [f"{rows} rows scored, {scored.cut} answers cut"]
    right, pairs = scored.right
    if pairs:
        low, high = wilson(right, pairs)
        summary.append(
            f"{right / pairs:.3f} of {pairs} pairs ranked right (95 % interval {low:.3f} to "
            f"{high:.3f})"
        )
    return "; ".join(summary)


# --- rows ----------------------------------------------------------------------------------------


def _scorable(row: Row, attributes: tuple[str, ...]) -> Scorable:
    """The answers of a row; its columns decide its form."""
    columns = {name for name, value in row.data.items() if value is not None}
    if "steps" in columns or {"completions", "labels"} <= columns:
        return _steps_row(row, columns, attributes)
    to_score = functools.partial(_to_score, attributes)
    if {"chosen", "rejected"} <= columns or {"chosen_messages", "rejected_messages"} <= columns:
        pair = to_preference(row)
        both = tuple(
            Conversation(pair.prompt + side, row.origin, len(pair.prompt), pair.tools)
            for side in (pair.chosen, pair.rejected)
        )
        return Scorable(both, functools.partial(_pair_result, to_score))
    if columns & {"answers", "completions"}:
        if not columns & {"scores", "ranks"}:
            key = "answers" if "answers" in columns else "completions"
            row = _fill_column(row, "ranks", row.data[key], 1.0)
        ranked = to_ranked(row)
        answers = tuple(
            Conversation(ranked.prompt + answer, row.origin, len(ranked.prompt), ranked.tools)
            for answer in ranked.answers
        )
        return Scorable(answers, lambda outputs: [to_score(output) for output in outputs])
    conversation = to_conversation(row)
    if conversation.messages[-1]["role"] != "assistant":
        fail(
            row.origin,
            "messages",
            f"a last turn of the {conversation.messages[-1]['role']}",
            "the assistant's answer, which is what is scored",
            "add it or remove the row",
        )
    # The score is read at the end of the last answer, whichever turns are flagged for training.
    last = len(conversation.messages) - 1
    conversation = conversation._replace(trained_from=last, untrained=())
    return Scorable((conversation,), lambda outputs: to_score(outputs[0]))


def _steps_row(row: Row, columns: set[str], attributes: tuple[str, ...]) -> Scorable:
    """A row whose steps are all scored."""
    if len(attributes) > 1:
        raise ValueError(
            f"{row.origin}: steps, but the reward model has the attributes "
            f"{', '.join(attributes)}; wanted one with a single output"
        )
    if "labels" not in columns:
        row = _fill_column(row, "labels", row.data["steps"], 1.0)
    example = to_steps(row)
    answer = {"role": "assistant", "content": "\n".join(example.steps)}
    conversation = Conversation((*example.prompt, answer), row.origin, len(example.prompt))
    return Scorable((conversation,), _steps_result, example.steps)


def _to_score(attributes: tuple[str, ...], output: np.ndarray) -> Score:
    if not attributes:
        return float(output[0])
    return dict(zip(attributes, map(float, output), strict=True))


def _pair_result(
    to_score: Callable[[np.ndarray], Score], outputs: list[np.ndarray]
) -> dict[str, Score]:
    chosen, rejected = outputs
    margin = chosen.astype(np.float64) - rejected.astype(np.float64)
    return {
        "chosen": to_score(chosen),
        "rejected": to_score(rejected),
        "margin": to_score(margin),
    }


def _steps_result(outputs: list[np.ndarray]) -> dict[str, Any]:
    logits = np.array([output[0] for output in outputs], np.float64)
    probabilities = 0.5 * (1 + np.tanh(logits / 2))  # σ(logit), without overflow
    return {
        "steps": probabilities.tolist(),
        "product": float(probabilities.prod()),
        "min": float(probabilities.min()),
    }


def _fill_column(row: Row, column: str, like: Any, value: float) -> Row:
    """Adds a column of equal numbers, as long as `like`, which the row's form requires."""
    if not isinstance(like, list):
        fail(row.origin, column, short(like), "a list of answers or steps")
    return Row(row.data | {column: [value] * len(like)}, row.origin)


# --- tokens --------------------------------------------------------------------------------------


def _encode(
    tok: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    scorables: Sequence[Scorable],
    length: int | None,
    chat_template: str | None,
    style: Style,
) -> tuple[list[Encoded], list[list[int]]]:
    """The documents of all rows, and the token positions of each whose outputs are scores."""
    documents: list[Encoded] = []
    ends: list[list[int]] = []
    conversations = [
        conversation
        for scorable in scorables
        if not scorable.steps
        for conversation in scorable.conversations
    ]
    encoded = iter(encode_conversations(tok, conversations, chat_template, style=style))
    for row, scorable in zip(rows, scorables, strict=True):
        if scorable.steps:
            document, positions = _encode_steps(tok, scorable, row, chat_template, style)
            if length is not None and len(document.ids) > length:
                raise ValueError(
                    f"{row.origin}: the steps end beyond length={length}, at "
                    f"{len(document.ids)} tokens; give a larger length"
                )
            documents.append(document)
            ends.append(positions)
            continue
        for document in itertools.islice(encoded, len(scorable.conversations)):
            # Drop the text that the template appends to the last answer: training had no such
            # tokens.
            last = int(np.flatnonzero(document.trained)[-1])
            documents.append(Encoded(document.ids[: last + 1], document.trained[: last + 1]))
            ends.append([last])
    return documents, ends


def _encode_steps(
    tok: PreTrainedTokenizerBase,
    scorable: Scorable,
    row: Row,
    chat_template: str | None,
    style: Style,
) -> tuple[Encoded, list[int]]:
    prompt = scorable.conversations[0].messages[:-1]
    example = Steps(prompt, scorable.steps, (1.0,) * len(scorable.steps), row.origin)
    (encoded,) = encode_steps(tok, [example], chat_template, style=style)
    return Encoded(encoded.ids, encoded.trained), [int(end) for end in encoded.ends]


def _outputs_at(
    scorer: Scorer,
    params: Params,
    documents: Sequence[Encoded],
    ends: Sequence[Sequence[int]],
    batch: int,
    length: int | None,
) -> tuple[list[np.ndarray], int]:
    """The head's outputs at given positions of each document.

    Documents of similar length share a batch, padded to one of few widths, so that there is little
    padding and few compilations.

    Returns:
      One array `[positions, A]` per document, and the number of documents that were cut.
    """
    if batch < 1:
        raise ValueError(f"batch={batch}: wanted a positive number of answers at a time")
    if length is not None and length < 1:
        raise ValueError(f"length={length}: wanted a positive number of tokens")

    @jax.jit
    def run(params: Params, tokens: TokenBatch) -> jax.Array:
        hidden = scorer.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
        return scorer.outputs(params, hidden)  # [B, T, D] -> [B, T, A]

    full = [len(document.ids) for document in documents]
    sizes = [size if length is None else min(size, length) for size in full]
    shortened = [
        Encoded(document.ids[:size], document.trained[:size])
        for document, size in zip(documents, sizes, strict=True)
    ]
    Limits.of(scorer).check(extent_of(document.ids for document in shortened), "answers to score")
    results: list[np.ndarray] = [np.zeros(0)] * len(documents)
    order = sorted(range(len(documents)), key=lambda i: -sizes[i])
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = bucket(sizes[group[0]])
        tokens = token_rows(shortened, [[i] for i in group], batch, width, 0)
        outputs = np.asarray(run(params, tokens))
        for row, i in enumerate(group):
            results[i] = outputs[row, np.minimum(np.asarray(ends[i]), sizes[i] - 1)]
    return results, sum(before > after for before, after in zip(full, sizes, strict=True))
