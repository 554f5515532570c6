"""The batches that algorithms take: files → examples → tokens → rows of static shapes.

There is one function for each kind of example. They share their options
(`jaxalign.data.options.Options`) and the processing of rows (`jaxalign.data.prepare`). Truncated
and dropped rows are counted and printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.data.branches import shared_rows
from jaxalign.data.chat import (
    Encoded,
    encode_conversations,
    encode_prompts,
    encode_texts,
    encode_training,
)
from jaxalign.data.examples import Conversation, Preference, Prompt, Text, TrainOn
from jaxalign.data.loader import Batches, in_memory
from jaxalign.data.mixture import Entry, entries_of
from jaxalign.data.options import Options, options_of, spelled_out
from jaxalign.data.packing import prompt_rows, token_rows
from jaxalign.data.prepare import Group, Kept, Made, Recipe
from jaxalign.data.presence import reasons
from jaxalign.data.rows import to_conversation, to_preference, to_prompt, to_text
from jaxalign.data.sources import Row
from jaxalign.data.stream import streamed
from jaxalign.data.writers import Style
from jaxalign.types import PairBatch, PromptBatch, SharedPairBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@spelled_out
def sft_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    train_on: TrainOn = "all",
    **fields: Any,
) -> Batches[TokenBatch]:
    """Conversations and plain texts as token batches.

    A row ends with the end token of its last answer; text that a template writes after it is left
    out. Rows that are too long are truncated, and rows left without a trained token are dropped;
    both are counted.

    Args:
      sources: one or several of: a file, folder, glob or hub id (see `jaxalign.data.read_rows`), a
        `jaxalign.data.Source` with a weight or a number of rows, or rows as dicts.
      tok: a fast transformers tokenizer.
      options: how rows become batches; None: all at their defaults.
      train_on: which tokens of a conversation are trained: "all" answers, the "last" answer,
        "split" (one example per answer), or "everything"; see `jaxalign.data.train_on`.
      **fields: fields of `jaxalign.data.Options` that override `options`: `rows=64, length=2048,
        packing=False`. Rows are packed by default, separated by segment ids.

    Returns:
      `Batches` of TokenBatch, numpy `[rows, width]`; with `source_ids` if there are several
      sources.

    Raises:
      ValueError: an unreadable or invalid row, an unusable template, options that conflict, or no
        row left to train on.
    """
    options = options_of(options, fields).layout(default="best_fit")
    entries = entries_of(sources)
    style = Style.of(options)

    def read(row: Row, columns: Any, form: str | None) -> Conversation | Text:
        as_text = _is_text(row, columns, form)
        return (to_text if as_text else to_conversation)(row, columns, form)

    def encode(examples: Sequence[Any]) -> list[Made]:
        texts = [i for i, example in enumerate(examples) if isinstance(example, Text)]
        chats = [i for i, example in enumerate(examples) if not isinstance(example, Text)]
        plain = encode_texts(tok, [examples[i].text for i in texts])
        conversations = [examples[i] for i in chats]
        encoded = encode_training(tok, conversations, options.chat_template, train_on, style=style)
        made = [Made(i, [document]) for i, document in zip(texts, plain, strict=True)]
        made += [Made(chats[n], [document]) for n, document in encoded]
        return sorted(made, key=lambda document: document.example)

    build = token_builder(entries, pad_id(tok))
    recipe = Recipe("sft_batches", read, encode, build, notes=style.notes)
    return load(recipe, entries, options, tok)


@spelled_out
def preference_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    shared_prefix: bool = False,
    **fields: Any,
) -> Batches[Any]:
    """Preference pairs as pair batches; `loss_mask` marks the answers.

    Each side ends with the end token of its answer, where a reward model's score is read. A pair is
    dropped if either side keeps no token of its answer. Unpacked, a pair is the same row of both
    sides, and `mask` is None; rows that fill up the last batch are all False in both loss masks.
    Packed, a pair has the same row and segment on both sides; `mask` (and `margin`) are `[rows,
    S]`, where S is the largest number of pairs in a row (when streaming, at most `length` // 32).
    `margin` is set if the rows have one.

    Args:
      sources: as `sft_batches`.
      tok: a fast transformers tokenizer.
      options: as `sft_batches`. `length` is the length of each side, or with `shared_prefix` of
        both together. Pairs are packed only with `packing=True`.
      shared_prefix: both answers of a pair follow one copy of their prompt, in one row
        (`SharedPairBatch`): fewer tokens, the same losses for models that read `branch_ids`.
      **fields: as `sft_batches`.

    Returns:
      `Batches` of PairBatch, or of SharedPairBatch with `shared_prefix`.

    Raises:
      ValueError: as `sft_batches`; or only some rows have a margin.
    """
    options = _no_wrapping(options_of(options, fields).layout(), "pairs")
    entries = entries_of(sources)
    pad = pad_id(tok)
    margins: list[tuple[bool, str]] = []  # does the first row have one; its origin

    def read(row: Row, columns: Any, form: str | None) -> Preference:
        pair = to_preference(row, columns, form)
        has = pair.margin is not None
        if not margins:
            margins.append((has, pair.origin))
        elif margins[0][0] != has:
            lacking, other = (margins[0][1], pair.origin) if has else (pair.origin, margins[0][1])
            raise ValueError(
                f"{lacking}: margin: missing, while other rows ({other}) have one; give it in all "
                "rows or none"
            )
        return pair

    template, style = options.chat_template, Style.of(options)

    def encode(examples: Sequence[Preference]) -> list[Made]:
        sides = [
            encode_conversations(
                tok,
                [answered(p, getattr(p, side), (p.chosen, p.rejected)) for p in examples],
                template,
                style=style,
            )
            for side in ("chosen", "rejected")
        ]
        return [Made(i, pair) for i, pair in enumerate(zip(*sides, strict=True))]

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> PairBatch | SharedPairBatch:
        mine = groups[options.part]
        mask = np.zeros((len(mine), slots), np.bool_)
        margin = np.zeros((len(mine), slots), np.float32)
        given = margins[0][0]
        for row, group in enumerate(mine):
            mask[row, : len(group)] = True
            if given:
                pairs: Any = group
                margin[row, : len(group)] = [kept.examples[i].margin for i in pairs]
        sources = kept.sources if len(entries) > 1 else None
        layout: Any = (mine, len(mine), width, pad, sources)
        sides: Any = kept.sides
        if shared_prefix:
            tokens = shared_rows(*sides, *layout)
            return SharedPairBatch(tokens, margin=margin if given else None, mask=mask)
        chosen, rejected = (token_rows(side, *layout) for side in sides)
        packed = options.packing is not None
        of_pairs = None if not given else margin if packed else margin[:, 0]
        return PairBatch(chosen, rejected, margin=of_pairs, mask=mask if packed else None)

    recipe = Recipe(
        "preference_batches", read, encode, build, shared=shared_prefix, notes=style.notes
    )
    return load(recipe, entries, options, tok)


@spelled_out
def prompt_batches(
    sources: Any,
    tok: PreTrainedTokenizerBase,
    *,
    options: Options | None = None,
    **fields: Any,
) -> Batches[PromptBatch]:
    """Prompts as left-padded batches for rollouts, ending where the answer begins.

    Prompts longer than `length` lose their start, so that the question and the header of the answer
    stay; `keep="whole"` drops them instead. Both are counted. `PromptBatch.index` is the index into
    `Batches.examples`, which has the prompt's messages and its whole row. Rows that fill up the
    last batch have index -1 and mask False.

    Args:
      sources: as `sft_batches`.
      tok: a fast transformers tokenizer.
      options: as `sft_batches`; `length` is P, the positions of a prompt.
      **fields: as `sft_batches`.

    Raises:
      ValueError: as `sft_batches`; `packing`, `streaming`, `buckets` or `keep="answer_start"`,
        which do not apply to prompts.
    """
    options = options_of(options, fields).layout()
    for name, wrong, wanted in (
        ("packing", options.packing is not None, "False: prompts for rollouts are not packed"),
        ("streaming", options.streaming, "False: reward functions look rows up by their index"),
        ("buckets", options.buckets is not None, "None: all prompts of a rollout have one width"),
        ("keep", options.keep == "answer_start", "'prompt_end' or 'whole': prompts have no answer"),
    ):
        if wrong:
            raise ValueError(f"{name}: got {getattr(options, name)!r} for prompts, wanted {wanted}")
    pad = pad_id(tok)
    style = Style.of(options)

    def encode(examples: Sequence[Prompt]) -> list[Made]:
        prompts = encode_prompts(
            tok,
            [p.messages for p in examples],
            options.chat_template,
            [p.origin for p in examples],
            [p.tools for p in examples],
            kwargs=[p.template_kwargs for p in examples],
            style=style,
        )
        return [
            Made(i, [Encoded(ids, np.zeros(len(ids), np.bool_))]) for i, ids in enumerate(prompts)
        ]

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> PromptBatch:
        mine = groups[options.part]
        which: list[Any] = [group[0] for group in mine if group]  # empty rows come last
        documents: Any = kept.sides[0]
        return prompt_rows({i: documents[i].ids for i in which}, which, len(mine), width, pad)

    recipe = Recipe("prompt_batches", to_prompt, encode, build, prompts=True, notes=style.notes)
    return load(recipe, entries_of(sources), options, tok)


# Shared with `jaxalign.data.answers`


def load(
    recipe: Recipe, entries: Sequence[Entry], options: Options, tok: PreTrainedTokenizerBase
) -> Batches[Any]:
    """Loads all data at once, or a window at a time."""
    make = streamed if options.streaming else in_memory
    return make(recipe, entries, options, tok)


def answered(example: Any, answer: Any, answers: Sequence[Any] = ()) -> Conversation:
    """A prompt with one of its answers; only the answer is trained.

    Several `answers` all follow the same prompt: the reasoning prompt, if any of them begins with
    reasoning.
    """
    tools = getattr(example, "tools", ())
    kwargs = getattr(example, "template_kwargs", None)
    first = len(example.prompt)
    turns = [turn for other in answers for turn in other if turn["role"] == "assistant"]
    thinking = True if any(map(reasons, turns)) else None
    return Conversation(
        example.prompt + answer,
        example.origin,
        first,
        tools,
        template_kwargs=kwargs,
        thinking=thinking,
    )


def token_builder(entries: Sequence[Entry], pad: int) -> Any:
    """`Recipe.build` for one document per example."""

    def build(
        kept: Kept, groups: Sequence[Group], options: Options, width: int, slots: int
    ) -> TokenBatch:
        mine: Any = groups[options.part]
        documents: Any = kept.sides[0]
        sources = kept.sources if len(entries) > 1 else None
        return token_rows(documents, mine, len(mine), width, pad, sources)

    return build


def pad_id(tok: PreTrainedTokenizerBase) -> int:
    """The padding token; masks do not depend on it."""
    return 0 if tok.pad_token_id is None else int(tok.pad_token_id)


def _is_text(row: Row, columns: Any, form: str | None) -> bool:
    """Whether a row is plain text rather than a conversation."""
    if form is not None:
        return form == "text"
    names = {*row.data, *(columns if columns is not None else ())}
    return "text" in names and not names & {"messages", "conversations", *_PROMPTS}


_PROMPTS = ("prompt", "instruction", "question")


def no_packing(options: Options, what: str) -> Options:
    """Raises ValueError for `packing` where rows are not packed."""
    if options.packing is not None:
        raise ValueError(
            f"packing: got {options.packing!r} for {what}, which are not packed; use False"
        )
    return options


def _no_wrapping(options: Options, what: str) -> Options:
    if options.packing in ("wrapped", "best_fit_split"):
        raise ValueError(
            f"packing: got {options.packing!r} for {what}, which must not be cut; use True or False"
        )
    return options
