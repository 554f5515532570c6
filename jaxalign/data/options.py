"""The options that all batch functions share, checked once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypedDict

from jaxalign.data.faults import ON_ERROR

KEEP = ("answer_start", "prompt_end", "whole")
"""What stays of a row that is too long."""
PACKING = ("best_fit", "wrapped")
SPLITS = ("train", "validation")
DEDUP = ("exact", "near")


class More(TypedDict, total=False):
    """Keyword arguments that every batch function takes; `Options` says what they mean."""

    on_error: str
    keep: str | None
    buckets: Sequence[int] | None
    temperature: float | None
    validation: float | None
    split: str
    dedup: str | None
    dedup_threshold: float
    scripts: Sequence[str] | None
    script_share: float
    min_tokens: int
    max_tokens: int | None
    host: tuple[int, int]
    streaming: bool
    window: int
    prefetch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How rows become batches.

    Attributes:
      rows: B, rows of every batch, over all hosts.
      length: T, positions of a row.
      packing: None: one document (or pair) a row. "best_fit": several, decided once. "wrapped":
        plain texts laid end to end and cut where a row ends.
      epochs: passes over the data; None: forever.
      seed: of the order, in [0, 2³²).
      shuffle: a fresh order in every pass; False keeps the order of the rows.
      chat_template: see `jaxalign.data.resolve_chat_template`.
      on_error: "stop" stops at the first bad row, naming file, line and remedy; "drop" leaves bad
        rows out, counted by reason. What makes a whole file unreadable stops either way.
      keep: what stays of a row that is too long. "answer_start": its first `length` tokens, so that
        the answer loses its end. "prompt_end": the prompt loses its start, both sides of a pair the
        same tokens, and a row whose answer alone is too long is dropped. "whole": the row is
        dropped. None: "answer_start", and "prompt_end" for prompts.
      buckets: widths, ascending: each batch has the smallest of these that holds its rows, and
        rows of similar length share a batch. `length` is the last width, given or not. Without
        packing only. None: every batch is `length` wide.
      temperature: τ > 0, flattens the shares of a mixture: share ∝ weight^(1/τ), a source's weight
        being its number of rows where it gives none. 1 mixes in proportion; ∞ evenly. None: as 1,
        and sources without weights are simply read one after the other.
      validation: what is held out of the sources: a part in (0, 1) or a number of rows. Which rows
        these are depends on their prompts alone, so rows with the same prompt stay together.
      split: "train" leaves out what is held out, "validation" gives only that.
      dedup: "exact" drops a row that says the same as an earlier one, "near" also one whose
        character 5-grams have a Jaccard similarity of `dedup_threshold` with an earlier one.
      dedup_threshold: in (0, 1].
      scripts: writing systems (see `jaxalign.data.filters.SCRIPTS`) of which at least
        `script_share` of a row's letters must be. A script is no language: Latin is the script of
        English and French alike. None: any.
      script_share: in (0, 1].
      min_tokens: rows of fewer tokens, counted before cutting, are dropped.
      max_tokens: rows of more tokens, counted before cutting, are dropped; None: none are.
      host: (index, count): this host builds its part of each batch, rows index · rows / count and
        following. Positions count whole batches, so a run may go on with another number of hosts.
      streaming: reads, renders, tokenises and packs while training goes on, a window at a time.
      window: rows of the sources that are held, shuffled and packed together when streaming.
      prefetch: batches made ahead in a thread of their own; 0: none.
    """

    rows: int
    length: int
    packing: str | None = None
    epochs: int | None = 1
    seed: int = 0
    shuffle: bool = True
    chat_template: str | None = None
    on_error: str = "stop"
    keep: str | None = None
    buckets: Sequence[int] | None = None
    temperature: float | None = None
    validation: float | None = None
    split: str = "train"
    dedup: str | None = None
    dedup_threshold: float = 0.8
    scripts: Sequence[str] | None = None
    script_share: float = 0.5
    min_tokens: int = 0
    max_tokens: int | None = None
    host: tuple[int, int] = (0, 1)
    streaming: bool = False
    window: int = 1024
    prefetch: int = 2

    def __post_init__(self):
        for name, least, may_be_none in (
            ("rows", 1, False),
            ("length", 2, False),
            ("epochs", 1, True),
            ("seed", 0, False),
            ("min_tokens", 0, False),
            ("max_tokens", 1, True),
            ("window", 1, False),
            ("prefetch", 0, False),
        ):
            value = getattr(self, name)
            if value is None and may_be_none:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: got {value!r}, wanted an integer of at least {least}")
        if self.seed >= 2**32:
            raise ValueError(f"seed: got {self.seed}, wanted less than 2**32")
        for name, choices, may_be_none in (
            ("packing", PACKING, True),
            ("on_error", ON_ERROR, False),
            ("keep", KEEP, True),
            ("split", SPLITS, False),
            ("dedup", DEDUP, True),
        ):
            value = getattr(self, name)
            if not (value in choices or (value is None and may_be_none)):
                wanted = ", ".join(choices) + (" or None" if may_be_none else "")
                raise ValueError(f"{name}: got {value!r}, wanted {wanted}")
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        for name in ("dedup_threshold", "script_share"):
            value = getattr(self, name)
            if not 0 < value <= 1:
                raise ValueError(f"{name}: got {value!r}, wanted a number in (0, 1]")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature: got {self.temperature!r}, wanted a positive number")
        held = self.validation
        if held is not None and not (0 < held < 1 or (held >= 1 and held == int(held))):
            raise ValueError(
                f"validation: got {held!r}, wanted a part in (0, 1) or a number of rows"
            )
        index, count = self.host
        if not 0 <= index < count:
            raise ValueError(f"host: got {self.host}, wanted (index, count) with index < count")
        if self.rows % count:
            raise ValueError(
                f"rows: got {self.rows}, which {count} hosts do not divide; use a multiple of "
                f"{count}"
            )
        if self.buckets is not None:
            widths = list(self.buckets)
            if not widths or widths != sorted(set(widths)) or widths[0] < 2:
                raise ValueError(
                    f"buckets: got {widths}, wanted ascending widths of at least 2, such as "
                    f"[128, 256], up to length = {self.length}"
                )
            if widths[-1] > self.length:
                raise ValueError(
                    f"buckets: got the width {widths[-1]}, wanted at most length = {self.length}"
                )

    def _check_together(self) -> None:
        """Refuses options of which one would be ignored."""
        clashes = (
            (self.buckets is not None and self.packing is not None, "buckets", "without packing"),
            (self.split == "validation" and self.validation is None, "split", "with validation"),
            (self.streaming and self.dedup is not None, "dedup", "without streaming"),
            (
                self.streaming and self.validation is not None and self.validation >= 1,
                "validation",
                "as a part in (0, 1) when streaming, where the number of rows is unknown",
            ),
            (
                self.streaming and self.buckets is not None,
                "buckets",
                "without streaming; pack instead",
            ),
            (
                self.streaming and self.temperature is not None,
                "temperature",
                "without streaming, where the number of rows is unknown; give weights",
            ),
        )
        for wrong, name, wanted in clashes:
            if wrong:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted it {wanted}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that batches may have, ascending."""
        return tuple(sorted({*(self.buckets if self.buckets is not None else ()), self.length}))

    @property
    def part(self) -> slice:
        """This host's rows of a batch."""
        index, count = self.host
        size = self.rows // count
        return slice(index * size, (index + 1) * size)


def packing_name(packing: bool | str) -> str | None:
    """`packing` as a function takes it (False, True or a name) → as `Options` holds it.

    True is best fit.
    """
    if packing is True:
        return "best_fit"
    if packing is False:
        return None
    return packing
