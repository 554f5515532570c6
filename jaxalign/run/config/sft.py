"""The configuration of `jaxalign sft`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import sft
from jaxalign.run.config.base import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTRun(Run):
    """`jaxalign sft`.

    Attributes:
      sft: the algorithm's options.
    """

    sft: sft.Config = sft.Config()

    algorithm: ClassVar[str] = "sft"
    data_options: ClassVar[tuple[str, ...]] = ("train_on", "packing=pieces")
