"""Checks token ids and document lengths against a model's embedding rows and positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxalign.types import PromptBatch, TokenBatch


class Extent(NamedTuple):
    """The largest token id and length of some documents.

    Attributes:
      longest: tokens of the longest document.
      largest: the largest token id.
    """

    longest: int
    largest: int


class Limits(NamedTuple):
    """The largest token id and length that a model can read.

    Attributes:
      rows: the rows of its embedding.
      positions: the rows of its learned position embedding; None: it has none, and takes any
        length.
      answer: tokens that are sampled after a document.
      tok: the tokenizer, to name a token; or None.
      context: the positions that the model was made for; None: unknown.
    """

    rows: int
    positions: int | None = None
    answer: int = 0
    tok: Any = None
    context: int | None = None

    @classmethod
    def of(cls, model: Any, answer: int = 0, tok: Any = None) -> Limits:
        """The limits of a decoder or scorer."""
        config = model.config
        positions = config.max_positions if config.learned_positions else None
        return cls(config.vocab_size, positions, answer, tok, config.max_positions)

    def check(self, extent: Extent, name: str) -> None:
        """Raises ValueError for ids and positions for which the model has no embedding.

        JAX would read another row for such an id, and NaN beyond the last position.

        Args:
          extent: the documents' extent.
          name: what the documents are, for the message.

        Raises:
          ValueError: an id or a position is out of range; the message names the token or the
            lengths.
        """
        if extent.largest >= self.rows:
            token = None if self.tok is None else self.tok.convert_ids_to_tokens(extent.largest)
            called = "" if token is None else f" ({token!r})"
            raise ValueError(
                f"{name}: holds the token {extent.largest}{called}, and the model has "
                f"{self.rows} rows of embeddings; tokenizer and model do not belong together, or "
                "the token has to go"
            )
        if self.positions is not None and extent.longest + self.answer > self.positions:
            answer = f", with {self.answer} more to be sampled" if self.answer else ""
            remedy = f"{self.positions - self.answer} tokens or fewer"
            if self.answer >= self.positions:
                remedy = f"max_new_tokens below {self.positions}"
            raise ValueError(
                f"{name}: the longest has {extent.longest} tokens{answer}, and the model has "
                f"n_positions={self.positions} learned positions; wanted {remedy} (length cuts, "
                "max_tokens drops longer rows)"
            )

    def note(self, extent: Extent, name: str) -> str:
        """A line about documents beyond the positions the model was made for; "" if there are none.

        Rotary positions go on beyond them, but the model may be poor where it has never been.
        """
        if self.context is None or extent.longest + self.answer <= self.context:
            return ""
        answer = f", with {self.answer} more to be sampled" if self.answer else ""
        return (
            f"{name}: the longest has {extent.longest} tokens{answer}; the model was made for "
            f"{self.context} (max_position_embeddings)"
        )


def extent_of(documents: Iterable[Sequence[int] | np.ndarray]) -> Extent:
    """The extent of documents of token ids."""
    longest = largest = 0
    for ids in documents:
        if len(ids):
            longest, largest = max(longest, len(ids)), max(largest, int(np.max(ids)))
    return Extent(longest, largest)


def extent_of_batch(batch: Any) -> Extent:
    """The extent of a batch of any kind, without its padding."""
    found = Extent(0, 0)
    todo = [batch]
    while todo:
        part = todo.pop()
        if isinstance(part, TokenBatch):
            real = part.segment_ids > 0
            most = int(np.max(part.positions, where=real, initial=-1)) + 1
            more = Extent(most, int(np.max(part.inputs, where=real, initial=0)))
        elif isinstance(part, PromptBatch):
            sizes = np.sum(part.mask, axis=-1)
            more = Extent(
                int(np.max(sizes, initial=0)), int(np.max(part.tokens, where=part.mask, initial=0))
            )
        else:
            todo += part if isinstance(part, tuple) else ()
            continue
        found = Extent(max(found.longest, more.longest), max(found.largest, more.largest))
    return found
