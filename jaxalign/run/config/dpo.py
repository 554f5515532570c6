"""The configuration of `jaxalign dpo`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import dpo
from jaxalign.algorithms.moving_reference import ReferenceSync
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import want
from jaxalign.run.config.reference import check_offload, check_sync


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPORun(Run):
    """`jaxalign dpo`.

    Attributes:
      dpo: the algorithm's options.
      reference: the frozen reference model; None: the starting model itself.
      reference_cache: folder for the reference's log-probabilities of all pairs, computed before
        training if they are not there, and then used in place of the reference, which is not held
        beside the policy. None: the reference is asked for every batch.
      reference_sync: let the reference follow the policy; None: it stays.
      offload_frozen: keep the reference in the host's memory but while it is asked.
    """

    dpo: dpo.Config = dpo.Config()
    reference: str | None = None
    reference_cache: str | None = None
    reference_sync: ReferenceSync | None = None
    offload_frozen: bool = False

    algorithm: ClassVar[str] = "dpo"
    data_options: ClassVar[tuple[str, ...]] = ("shared_prefix",)
    models_with_rules: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self):
        super().__post_init__()
        dpo.check_micro_batches(self.dpo, self.run.micro_batches)
        for name in ("reference", "reference_cache", "reference_sync"):
            value, loss_type = getattr(self, name), self.dpo.loss_type
            want(
                self.dpo.has_reference or value is None,
                name,
                value,
                f"null: dpo.loss_type={loss_type!r} has no reference",
            )
        want(
            self.reference_cache is None or self.reference_sync is None,
            "reference_cache",
            self.reference_cache,
            "null with reference_sync, under which the reference changes",
        )
        check_sync(self)
        held = self.dpo.has_reference and self.reference_cache is None
        check_offload(self, held=held)
