"""The configuration of `jaxalign kto`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import kto
from jaxalign.algorithms.moving_reference import ReferenceSync
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import want
from jaxalign.run.config.reference import check_offload, check_sync


@dataclasses.dataclass(frozen=True, kw_only=True)
class KTORun(Run):
    """`jaxalign kto`.

    Attributes:
      kto: the algorithm's options.
      reference: the frozen reference model; None: the starting model itself.
      reference_sync: let the reference follow the policy; None: it stays.
      offload_frozen: keep the reference in the host's memory but while it is asked.
    """

    kto: kto.Config = kto.Config()
    reference: str | None = None
    reference_sync: ReferenceSync | None = None
    offload_frozen: bool = False

    algorithm: ClassVar[str] = "kto"
    models_with_rules: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self):
        super().__post_init__()
        want(not self.data.packing, "data.packing", True, "false: KTO's answers are not packed")
        check_sync(self)
        check_offload(self, held=True)
