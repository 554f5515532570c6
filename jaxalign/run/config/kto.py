"""The configuration of `jaxalign kto`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import kto
from jaxalign.run.config.data import want
from jaxalign.run.config.reference import ReferenceRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTORun(ReferenceRun):
    """`jaxalign kto`.

    Attributes:
      kto: the algorithm's options.
    """

    kto: kto.Config = kto.Config()

    algorithm: ClassVar[str] = "kto"

    def __post_init__(self):
        super().__post_init__()
        want(not self.data.packing, "data.packing", True, "false: KTO's answers are not packed")
