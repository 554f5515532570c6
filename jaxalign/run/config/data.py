"""The data section of a run's configuration: sources, and the shape of a batch."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxalign.data.examples import TRAIN_ON
from jaxalign.data.mixture import Source, entries_of
from jaxalign.data.options import BatchOptions


def want(ok: bool, name: str, got: Any, wanted: str) -> None:
    """Raises ValueError for a value that an option does not accept."""
    if not ok:
        # A section has many values, so the message shows none of them.
        shown = "{…}" if dataclasses.is_dataclass(got) else repr(got)
        raise ValueError(f"{name}={shown}: wanted {wanted}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(BatchOptions):
    """A section `data`: what is read, and how rows become batches. docs/data.md has examples.

    Attributes:
      train: files, folders, globs or hub ids, or sources with options (`path`, `name`, `split`,
        `form`, `columns`, `weight`, `rows`, `epochs`; see `jaxalign.data.Source`).
      eval: held-out data; empty for none.
      shared_prefix: reward and DPO: both answers of a pair share one copy of their prompt.
      train_on: SFT: "all" answers of a conversation, the "last", "split" (one example per answer)
        or "everything".
    """

    train: tuple[str | Source, ...]
    eval: tuple[str | Source, ...] = ()
    shared_prefix: bool = False
    train_on: str = "all"

    def __post_init__(self):
        want(bool(self.train), "data.train", self.train, "at least one file")
        want(self.train_on in TRAIN_ON, "data.train_on", self.train_on, f"one of {TRAIN_ON}")
        want(
            self.validation is None or not self.eval,
            "data.validation",
            self.validation,
            "null beside data.eval",
        )
        entries_of(self.train)
        super().__post_init__()
