"""Batches of judged answers: marked good or bad, ranked, graded, or labelled step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxalign.data.batches import answered, load, no_packing, pad_id
from jaxalign.data.chat import Encoded, encode_conversations
from jaxalign.data.examples import Conversation, Graded, Ranked, RowError, Steps, Unpaired
from jaxalign.data.loader import Batches
from jaxalign.data.mixture import entries_of
from jaxalign.data.options import Options, options_of, spelled_out
from jaxalign.data.packing import token_rows
from jaxalign.data.prepare import Group, Kept, Made, Recipe
from jaxalign.data.rows import to_graded, to_ranked, to_steps, to_unpaired
from jaxalign.data.sources import Row
from jaxalign.data.steps import encode_steps
from jaxalign.data.writers import Style
from jaxalign.types import GradedBatch, RankedBatch, StepBatch, TokenBatch, UnpairedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@spelled_out
def unpaired_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    **fields: Any,
) -> Batches[UnpairedBatch]:
    """Single answers marked good or bad; one per row.

    `mismatched` pairs each prompt with the answer of the next row of the global batch (the last row
    takes the first row's answer), truncated to the row's length. A batch of a single row has no
    other answer: its mismatched row is empty.

    Args:
      sources: as `sft_batches`.
      tok: a fast transformers tokenizer.
      options: as `sft_batches`, without packing; `rows` counts answers.
      **fields: as `sft_batches`.

    Raises:
      ValueError: as `sft_batches`.
    """
    options = no_packing(options_of(options, fields).layout(), "answers")
    entries = entries_of(sources)
    pad = pad_id(tok)
    style = Style.of(options)

    def encode(examples: Sequence[Unpaired]) -> list[Made]:
        return single(tok, [answered(e, e.answer) for e in examples], options, style)

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> UnpairedBatch:
        documents: Any = kept.sides[0]
        sources = kept.sources if len(entries) > 1 else None
        there: list[Any] = [group[0] for group in groups if group]
        following = dict(zip(there, there[1:] + there[:1], strict=True))
        mine: Any = groups[options.part]
        mixed: dict[int, Encoded] = {}
        swapped: list[list[int]] = []
        for group in mine:
            ours = [i for i in group if following[i] != i]
            for i in ours:
                mixed[i] = _mismatched(documents[i], documents[following[i]], width)
            swapped.append(ours)
        desirable = [bool(group) and kept.examples[group[0]].desirable for group in mine]
        return UnpairedBatch(
            token_rows(documents, mine, len(mine), width, pad, sources),
            np.asarray(desirable, np.bool_),
            token_rows(mixed, swapped, len(mine), width, pad, sources),
        )

    recipe = Recipe("unpaired_batches", to_unpaired, encode, build, notes=style.notes)
    return load(recipe, entries, options, tok)


@spelled_out
def ranked_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    answers: int | None = None,
    **fields: Any,
) -> Batches[RankedBatch]:
    """Several answers to a prompt with their ranks; preference rows count as two answers.

    Args:
      sources: as `sft_batches`.
      tok: a fast transformers tokenizer.
      options: as `sft_batches`, without packing; `rows` counts prompts,
        `length` the positions of a prompt with one answer.
      answers: K, the largest number of answers to a prompt; a row with more is an error. None: the
        largest number in any row.
      **fields: as `sft_batches`.

    Returns:
      `Batches` of RankedBatch, leaves `[rows, K, width]`.

    Raises:
      ValueError: as `sft_batches`; `answers` missing when streaming.
    """
    options = no_packing(options_of(options, fields).layout(), "answers")
    entries = entries_of(sources)
    pad = pad_id(tok)
    style = Style.of(options)
    if answers is None and options.streaming:
        raise ValueError("answers: got None, wanted the most that a prompt has when streaming")
    if answers is not None and answers < 2:
        raise ValueError(f"answers: got {answers}, wanted at least 2")

    def read(row: Row, columns: Any, form: str | None) -> Ranked:
        example = to_ranked(row, columns, form)
        if answers is not None and len(example.answers) > answers:
            raise RowError(
                example.origin,
                f"more than {answers} answers",
                f"got {len(example.answers)} answers, wanted at most answers = {answers}; raise "
                "it, or remove some",
            )
        return example

    def encode(examples: Sequence[Ranked]) -> list[Made]:
        whole = [answered(e, answer, e.answers) for e in examples for answer in e.answers]
        found = iter(encode_conversations(tok, whole, options.chat_template, style=style))
        return [Made(i, [next(found) for _ in e.answers]) for i, e in enumerate(examples)]

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> RankedBatch:
        most = len(kept.sides) if answers is None else answers
        mine: Any = groups[options.part]
        ranks = np.zeros((len(mine), most), np.float32)
        mask = np.zeros((len(mine), most), np.bool_)
        documents: dict[int, Any] = {}
        members: list[list[int]] = []
        sources: dict[int, int] = {}
        for row, group in enumerate(mine):
            for k in range(most):
                there = bool(group) and k < len(kept.examples[group[0]].answers)
                members.append([len(members)] if there else [])
                if there:
                    at = members[-1][0]
                    documents[at] = kept.sides[k][group[0]]
                    sources[at] = int(kept.sources[group[0]])
                    ranks[row, k], mask[row, k] = kept.examples[group[0]].ranks[k], True
        given = sources if len(entries) > 1 else None
        flat = token_rows(documents, members, len(members), width, pad, given)
        shaped = jax.tree.map(lambda x: x.reshape(len(mine), most, width), flat)
        return RankedBatch(shaped, ranks, mask)

    recipe = Recipe("ranked_batches", read, encode, build, notes=style.notes)
    return load(recipe, entries, options, tok)


@spelled_out
def graded_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    attributes: Sequence[str] | None = None,
    **fields: Any,
) -> Batches[GradedBatch]:
    """Answers with a score for each of several attributes; one answer per row.

    Args:
      sources: as `sft_batches`.
      tok: a fast transformers tokenizer.
      options: as `sft_batches`, without packing; `rows` counts answers.
      attributes: the columns of `scores`, in this order; a row with none of them is an error. None:
        all attributes in the data, in alphabetical order (not when streaming).
      **fields: as `sft_batches`.

    Raises:
      ValueError: as `sft_batches`.
    """
    options = no_packing(options_of(options, fields).layout(), "answers")
    entries = entries_of(sources)
    pad = pad_id(tok)
    style = Style.of(options)
    if attributes is None and options.streaming:
        raise ValueError("attributes: got None, wanted the names of the scores when streaming")
    seen: dict[str, None] = {}

    def read(row: Row, columns: Any, form: str | None) -> Graded:
        example = to_graded(row, columns, form)
        if attributes is not None and not set(attributes) & set(example.scores):
            raise RowError(
                example.origin,
                "none of the attributes",
                f"got scores for {', '.join(example.scores)}, wanted one of "
                f"{', '.join(attributes)}; correct attributes or the row",
            )
        seen.update(dict.fromkeys(example.scores))
        return example

    def encode(examples: Sequence[Graded]) -> list[Made]:
        return single(tok, [answered(e, e.answer) for e in examples], options, style)

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> GradedBatch:
        names = sorted(seen) if attributes is None else list(attributes)
        mine: Any = groups[options.part]
        scores = np.zeros((len(mine), len(names)), np.float32)
        mask = np.zeros((len(mine), len(names)), np.bool_)
        for row, group in enumerate(mine):
            given = kept.examples[group[0]].scores if group else {}
            for column, name in enumerate(names):
                if name in given:
                    scores[row, column], mask[row, column] = given[name], True
        documents: Any = kept.sides[0]
        sources = kept.sources if len(entries) > 1 else None
        tokens = token_rows(documents, mine, len(mine), width, pad, sources)
        return GradedBatch(tokens, scores, mask)

    recipe = Recipe("graded_batches", read, encode, build, notes=style.notes)
    return load(recipe, entries, options, tok)


@spelled_out
def step_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    **fields: Any,
) -> Batches[StepBatch]:
    """Answers in labelled steps; one answer per row.

    A step's label is at the token that holds the step's last character. Each step is written on its
    own line. Steps that truncation removes have no label.

    Args:
      sources: as `sft_batches`.
      tok: a fast transformers tokenizer.
      options: as `sft_batches`, without packing; `rows` counts answers.
      **fields: as `sft_batches`.

    Raises:
      ValueError: as `sft_batches`.
    """
    options = no_packing(options_of(options, fields).layout(), "answers")
    entries = entries_of(sources)
    pad = pad_id(tok)
    style = Style.of(options)

    def encode(examples: Sequence[Steps]) -> list[Made]:
        made = []
        for i, found in enumerate(encode_steps(tok, examples, options.chat_template, style=style)):
            mark = np.full(len(found.ids), np.nan, np.float32)
            if len(set(found.ends.tolist())) < len(found.ends):
                raise RowError(
                    examples[i].origin,
                    "two steps end in the same token",
                    "steps: two of them end in the same token; join them, or end each with a mark",
                )
            mark[found.ends] = examples[i].labels
            made.append(Made(i, [Encoded(found.ids, found.trained)], mark))
        return made

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> StepBatch:
        mine: Any = groups[options.part]
        documents: Any = kept.sides[0]
        marks: Any = kept.marks
        found = np.full((len(mine), width), np.nan, np.float32)
        for row, group in enumerate(mine):
            for i in group:
                found[row, : len(marks[i])] = marks[i]
        sources = kept.sources if len(entries) > 1 else None
        tokens: TokenBatch = token_rows(documents, mine, len(mine), width, pad, sources)
        mask = ~np.isnan(found)
        return StepBatch(tokens, np.where(mask, found, np.float32(0)), mask)

    recipe = Recipe("step_batches", to_steps, encode, build, notes=style.notes)
    return load(recipe, entries, options, tok)


def single(
    tok: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    options: Options,
    style: Style,
) -> list[Made]:
    """Builds rows with one document per example."""
    found = encode_conversations(tok, conversations, options.chat_template, style=style)
    return [Made(i, [document]) for i, document in enumerate(found)]


def _mismatched(ours: Encoded, other: Encoded, width: int) -> Encoded:
    """A prompt with another's answer."""
    start, first = (int(np.argmax(document.trained)) for document in (ours, other))
    ids = np.concatenate([ours.ids[:start], other.ids[first:]])[:width]
    trained = np.concatenate([ours.trained[:start], other.trained[first:]])[:width]
    return Encoded(ids, trained)
