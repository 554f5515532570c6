"""Batches for the four algorithms: sources → examples → tokens → rows of one static shape.

What was cut and what was dropped is counted and printed, never passed over. `grain` shuffles,
repeats and batches; its position can be saved, and resuming gives exactly the next batch.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import grain
import numpy as np

from jaxalign.data.chat import Encoded, encode_conversations, encode_prompts
from jaxalign.data.examples import Conversation
from jaxalign.data.packing import best_fit, prompt_rows, token_rows
from jaxalign.data.rows import to_conversation, to_preference, to_prompt
from jaxalign.data.sources import Sources, read_rows
from jaxalign.types import PairBatch, PromptBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch = TypeVar("Batch")


class Batches(Generic[Batch]):
    """An iterable of batches of one shape, with a position that can be saved.

    `iter()` starts at the beginning, or, once after `set_state`, at the position given there.
    Every pass gives the same batches. Batches run across the ends of epochs, so only the very
    last one may be filled up with empty rows.

    Attributes:
      examples: the kept rows as read (`Conversation`, `Preference` or `Prompt`).
      stats: counts: `read` rows; `cut` rows; `dropped` rows by reason; `kept` rows; `tokens` and
        `trained` tokens kept; `rows` that they fill in an epoch; `fill`, the part of those rows'
        positions that holds tokens, in (0, 1].
    """

    def __init__(
        self,
        name: str,
        settings: _Settings,
        kept: _Kept,
        groups: Sequence[list[int]],
        build: Callable[[list[list[int]]], Batch],
    ):
        room = len(groups) * settings.length * len(kept.sides)
        self.examples = kept.examples
        self.stats = kept.stats | {"rows": len(groups), "fill": kept.stats["tokens"] / room}
        self._name = name
        self._settings = settings
        self._checksum = _checksum([name, *settings._replace(epochs=None)], kept.sides, groups)
        self._announced = False
        self._start: dict[str, Any] | None = None
        self._iterator: Any = None

        def assemble(which: Sequence[int]) -> Batch:
            return build([groups[i] for i in which])

        data = grain.MapDataset.source(range(len(groups))).seed(settings.seed)
        if settings.shuffle:
            data = data.shuffle()
        self._data = data.repeat(settings.epochs).batch(settings.rows, batch_fn=assemble)

    def __len__(self) -> int:
        """Batches in all epochs together."""
        if self._settings.epochs is None:
            raise TypeError(f"{self._name} with epochs=None goes on forever: it has no len()")
        return len(self._data)

    def __iter__(self) -> Iterator[Batch]:
        if not self._announced and (self.stats["cut"] or self.stats["dropped"]):
            self.describe()
        self._iterator = self._fresh()
        if self._start is not None:
            self._iterator.set_state(self._start)
            self._start = None
        return self._iterator

    def _fresh(self) -> Any:
        # Rows are assembled in microseconds: grain's reading threads would only cost.
        return iter(
            self._data.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        )

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch given out, as JSON-able data."""
        if self._start is not None:
            position = self._start
        else:
            source = self._iterator if self._iterator is not None else self._fresh()
            position = source.get_state()
        return {"position": json.loads(json.dumps(position)), "checksum": self._checksum}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Makes the next `iter()` start at a saved position.

        Raises:
          ValueError: the state was saved over other data or other settings (tokenizer, template,
            rows, length, packing, seed, shuffle): its position would mean other batches.
        """
        if set(state) != {"position", "checksum"}:
            raise ValueError(
                f"state: got the keys {sorted(state)}, wanted checksum and position; "
                f"pass what {self._name}(...).get_state() gave"
            )
        if state["checksum"] != self._checksum:
            raise ValueError(
                f"state: it belongs to other data or settings (checksum {state['checksum']}, here "
                f"{self._checksum}); resume with the same files, tokenizer, rows, length, packing, "
                "seed and shuffle, or start anew"
            )
        self._start = dict(state["position"])

    def describe(self) -> str:
        """Prints, and returns, what was read, cut, dropped and how full the rows are."""
        self._announced = True
        s, length = self.stats, self._settings.length
        lines = [
            f"{self._name}: {s['read']} rows read, {s['kept']} kept, {s['cut']} cut to {length} "
            f"tokens, {sum(s['dropped'].values())} dropped; {s['tokens']:,} tokens"
            + (f" ({s['trained']:,} trained)" if s["trained"] else "")
            + f" in {s['rows']} rows of {length}, {s['fill']:.1%} filled"
        ]
        lines += [f"  dropped {count}: {why}" for why, count in s["dropped"].items()]
        text = "\n".join(lines)
        print(text)
        return text


class _Settings(NamedTuple):
    """The arguments that all three functions share, checked."""

    rows: int
    length: int
    epochs: int | None
    seed: int
    shuffle: bool

    def check(self) -> _Settings:
        for name, least in (("rows", 1), ("length", 2), ("epochs", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "epochs" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"seed: got {self.seed}, wanted less than 2**32")
        return self


def sft_batches(
    sources: Sources,
    tok: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    packing: bool = True,
    epochs: int | None = 1,
    seed: int = 0,
    shuffle: bool = True,
    chat_template: str | None = None,
) -> Batches[TokenBatch]:
    """Conversations as token batches; every assistant turn is trained.

    A row ends with the end token of its last answer: what a template writes after it is left out.
    Conversations longer than `length` lose their end (counted); those that keep no trained token
    are dropped (counted).

    Args:
      sources: see `jaxalign.data.sources.read_rows`; forms in `jaxalign.data.rows`.
      tok: a fast transformers tokenizer.
      rows: B, rows of every batch.
      length: T, positions of a row.
      packing: several conversations a row (best fit, decided once), kept apart by segment ids;
        else one a row.
      epochs: passes over the data; None: forever.
      seed: of the order, which differs in every epoch.
      shuffle: False keeps the order of the rows (packed: longest first).
      chat_template: None (the tokenizer's), "chatml", "none", a jinja file or text.

    Returns:
      `Batches` of TokenBatch, numpy `[rows, length]`.

    Raises:
      ValueError: an unreadable or wrong row, an unusable template, or no row left to train on.
    """
    settings = _Settings(rows, length, epochs, seed, shuffle).check()
    examples = [to_conversation(row) for row in read_rows(sources)]
    documents = encode_conversations(tok, examples, chat_template)
    kept = _keep("sft_batches", [documents], examples, length)
    pad_id = _pad_id(tok)

    def build(groups: list[list[int]]) -> TokenBatch:
        return token_rows(kept.sides[0], groups, rows, length, pad_id)

    return Batches("sft_batches", settings, kept, _groups(kept, length, packing), build)


def preference_batches(
    sources: Sources,
    tok: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    packing: bool = False,
    epochs: int | None = 1,
    seed: int = 0,
    shuffle: bool = True,
    chat_template: str | None = None,
) -> Batches[PairBatch]:
    """Preference pairs as pair batches; `loss_mask` marks the answers.

    Each side ends with the end token of its answer, where a reward model's score is read. A side
    longer than `length` loses its end (the pair counts as cut once); a pair of which a side keeps
    no token of its answer is dropped. Unpacked, a pair is a row of both sides, and `mask` is None;
    rows that fill up the last batch are all False in both loss masks. Packed, a pair has the same
    row and segment on both sides; `mask` (and `margin`) are `[rows, S]`, S the most pairs that
    share a row of this data. `margin` is there if the rows have one.

    Arguments as `sft_batches`.

    Raises:
      ValueError: as `sft_batches`; or only some rows have a margin.
    """
    settings = _Settings(rows, length, epochs, seed, shuffle).check()
    examples = [to_preference(row) for row in read_rows(sources)]
    lacking = [pair.origin for pair in examples if pair.margin is None]
    if lacking and len(lacking) < len(examples):
        raise ValueError(
            f"{lacking[0]}: margin: missing, while other rows have one; give it in all rows or none"
        )
    sides = [
        encode_conversations(
            tok,
            [Conversation(p.prompt + getattr(p, side), p.origin, len(p.prompt)) for p in examples],
            chat_template,
        )
        for side in ("chosen", "rejected")
    ]
    kept = _keep("preference_batches", sides, examples, length)
    groups = _groups(kept, length, packing)
    most = max(len(group) for group in groups)
    pad_id = _pad_id(tok)

    def build(groups: list[list[int]]) -> PairBatch:
        chosen, rejected = (token_rows(side, groups, rows, length, pad_id) for side in kept.sides)
        mask = np.zeros((rows, most), np.bool_)
        margin = np.zeros((rows, most), np.float32)
        for row, group in enumerate(groups):
            mask[row, : len(group)] = True
            if not lacking:
                margin[row, : len(group)] = [kept.examples[i].margin for i in group]
        given = None if lacking else margin if packing else margin[:, 0]
        return PairBatch(chosen, rejected, margin=given, mask=mask if packing else None)

    return Batches("preference_batches", settings, kept, groups, build)


def prompt_batches(
    sources: Sources,
    tok: PreTrainedTokenizerBase,
    *,
    rows: int,
    length: int,
    epochs: int | None = 1,
    seed: int = 0,
    shuffle: bool = True,
    chat_template: str | None = None,
) -> Batches[PromptBatch]:
    """Prompts as left-padded batches for rollouts, ending where the answer begins.

    Prompts longer than `length` lose their start (counted), so that the question and the header of
    the answer stay. `PromptBatch.index` is the place in `Batches.examples`: the prompt's messages
    and its whole row. Rows that fill up the last batch have index -1 and mask False.

    Arguments and errors as `sft_batches`; `length` is P, positions of a prompt.
    """
    settings = _Settings(rows, length, epochs, seed, shuffle).check()
    examples = [to_prompt(row) for row in read_rows(sources)]
    prompts = encode_prompts(
        tok, [p.messages for p in examples], chat_template, [p.origin for p in examples]
    )
    cut = sum(len(ids) > length for ids in prompts)
    documents = [Encoded(ids[-length:], np.zeros(min(len(ids), length), bool)) for ids in prompts]
    tokens = sum(len(d.ids) for d in documents)
    stats = {"read": len(examples), "kept": len(examples), "cut": cut, "dropped": {}}
    kept = _Kept([documents], examples, stats | {"tokens": tokens, "trained": 0})
    pad_id = _pad_id(tok)

    def build(groups: list[list[int]]) -> PromptBatch:
        which = [group[0] for group in groups]
        return prompt_rows([d.ids for d in documents], which, rows, length, pad_id)

    return Batches("prompt_batches", settings, kept, _groups(kept, length, False), build)


class _Kept(NamedTuple):
    """What is left of the data: documents of each side, their rows, the counts so far."""

    sides: list[list[Encoded]]
    examples: list[Any]
    stats: dict[str, Any]


def _keep(name: str, sides: list[list[Encoded]], examples: list[Any], length: int) -> _Kept:
    """Cuts documents to `length`, drops rows of which nothing is left to train, counts both."""
    sides = [[_to_last_answer(document) for document in side] for side in sides]
    kept: list[int] = []
    cut = 0
    dropped: dict[str, int] = {}
    for row in range(len(examples)):
        documents = [side[row] for side in sides]
        # The first token of a row is predicted by nothing, so it cannot be trained.
        if all(d.trained[1:length].any() for d in documents):
            kept.append(row)
            cut += any(len(d.ids) > length for d in documents)
        else:
            missing = not all(d.trained[1:].any() for d in documents)
            why = "no token to train" if missing else f"the answer begins beyond {length} tokens"
            dropped[why] = dropped.get(why, 0) + 1
    if not kept:
        lengths = sorted(len(d.ids) for side in sides for d in side)
        raise ValueError(
            f"{name}: no row is left to train on (loss masks all False): {len(examples)} read, "
            f"dropped {dropped}; the documents have {lengths[0]} to {lengths[-1]} tokens, median "
            f"{lengths[len(lengths) // 2]}, length is {length}; give a larger length"
        )
    cuts = [
        [Encoded(ids[:length], trained[:length]) for ids, trained in (side[i] for i in kept)]
        for side in sides
    ]
    stats = {"read": len(examples), "kept": len(kept), "cut": cut, "dropped": dropped}
    stats["tokens"] = sum(len(d.ids) for side in cuts for d in side)
    stats["trained"] = sum(int(d.trained[1:].sum()) for side in cuts for d in side)
    return _Kept(cuts, [examples[i] for i in kept], stats)


def _to_last_answer(document: Encoded) -> Encoded:
    """Leaves out what a template writes after the last answer, such as a newline.

    A rollout ends with its stop token, so a reward model must learn to read its score there.
    """
    trained = np.flatnonzero(document.trained)
    if not trained.size:
        return document
    end = int(trained[-1]) + 1
    return Encoded(document.ids[:end], document.trained[:end])


def _groups(kept: _Kept, length: int, packed: bool) -> list[list[int]]:
    """Which documents (or pairs) share a row. Pairs fit where their longer sides do."""
    if not packed:
        return [[i] for i in range(len(kept.examples))]
    longest = [max(len(d.ids) for d in pair) for pair in zip(*kept.sides, strict=True)]
    return best_fit(longest, length)


def _pad_id(tok: PreTrainedTokenizerBase) -> int:
    return 0 if tok.pad_token_id is None else int(tok.pad_token_id)


def _checksum(settings: list[Any], sides: list[list[Encoded]], groups: Sequence[list[int]]) -> int:
    """A number that changes when a saved position would mean other batches."""
    checksum = zlib.crc32(json.dumps([settings, len(groups)]).encode())
    for side in sides:
        for ids, trained in side:
            checksum = zlib.crc32(trained.tobytes(), zlib.crc32(ids.tobytes(), checksum))
    return checksum
