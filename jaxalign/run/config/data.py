"""The part of a run's configuration that says what is read, and the shape of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign.data.examples import TRAIN_ON
from jaxalign.data.filters import check_scripts
from jaxalign.data.mixture import Source, entries_of
from jaxalign.data.options import Options, packing_name


def want(ok: bool, name: str, got: Any, wanted: str) -> None:
    """Refuses a value that is not what an option wants."""
    if not ok:
        raise ValueError(f"{name}={got!r}: wanted {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, and the shape of a batch. docs/data.md has examples.

    Attributes:
      train: files, folders, globs or hub ids, or sources with options (`path`, `name`, `split`,
        `form`, `columns`, `weight`, `rows`, `epochs`; see `jaxalign.data.Source`).
      eval: held-out data; empty for none.
      rows: rows of a batch, over all devices.
      length: tokens of a row (of a prompt, in PPO).
      packing: true or "best_fit": several documents or pairs a row; "wrapped": plain texts end to
        end, cut where a row ends (SFT); false: one a row.
      shared_prefix: reward and DPO: both answers of a pair follow one copy of their prompt.
      train_on: SFT: "all" answers of a conversation, the "last", "split" (an example an answer) or
        "everything".
      epochs: passes over the data; None repeats for ever (then `run.steps` must end the run).
      shuffle: a fresh order each epoch.
      keep: what stays of a row that is too long: "answer_start", "prompt_end", or "whole" (none of
        it: such rows are dropped). None: "answer_start", and "prompt_end" in PPO.
      buckets: widths of batches, ascending, for rows that are not packed; None: `length` only.
      temperature: flattens the shares of a mixture of sources; 1: in proportion.
      validation: a part (0.05) or a number of rows of `train` to be held out in place of `eval`.
      dedup: "exact" or "near" leaves out copies of earlier rows.
      dedup_threshold: how similar near-copies are, in (0, 1].
      scripts: writing systems that rows are to be in (latin, han, …); empty: any.
      script_share: the part of a row's letters that must be in them.
      min_tokens: shorter rows are dropped.
      max_tokens: longer rows are dropped rather than cut; None: none are.
      on_error: "stop" at the first bad row, or "drop" and count bad rows.
      streaming: read while training goes on, for data that does not fit in memory (`run.steps`
        must end the run).
      window: rows held, shuffled and packed together when streaming.
      prefetch: batches made ahead in a thread.
    """

    train: tuple[str | Source, ...]
    eval: tuple[str | Source, ...] = ()
    rows: int = 32
    length: int = 1024
    packing: bool | str = False
    shared_prefix: bool = False
    train_on: str = "all"
    epochs: int | None = 1
    shuffle: bool = True
    keep: str | None = None
    buckets: tuple[int, ...] | None = None
    temperature: float | None = None
    validation: float | None = None
    dedup: str | None = None
    dedup_threshold: float = 0.8
    scripts: tuple[str, ...] = ()
    script_share: float = 0.5
    min_tokens: int = 0
    max_tokens: int | None = None
    on_error: str = "stop"
    streaming: bool = False
    window: int = 1024
    prefetch: int = 2

    def __post_init__(self):
        want(bool(self.train), "data.train", self.train, "at least one file")
        want(self.train_on in TRAIN_ON, "data.train_on", self.train_on, f"one of {TRAIN_ON}")
        want(
            self.validation is None or not self.eval,
            "data.validation",
            self.validation,
            "null beside data.eval",
        )
        check_scripts(self.scripts)
        entries_of(self.train)
        # The room of data knows the rest, also which options go together.
        Options(
            rows=self.rows,
            length=self.length,
            packing=packing_name(self.packing),
            epochs=self.epochs,
            shuffle=self.shuffle,
            keep=self.keep,
            buckets=self.buckets,
            temperature=self.temperature,
            validation=self.validation,
            dedup=self.dedup,
            dedup_threshold=self.dedup_threshold,
            scripts=self.scripts if self.scripts else None,
            script_share=self.script_share,
            min_tokens=self.min_tokens,
            max_tokens=self.max_tokens,
            on_error=self.on_error,
            streaming=self.streaming,
            window=self.window,
            prefetch=self.prefetch,
        )
