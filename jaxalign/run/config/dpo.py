"""The configuration of `jaxalign dpo`."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms import dpo
from jaxalign.run.config.data import want
from jaxalign.run.config.reference import ReferenceRun


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPORun(ReferenceRun):
    """`jaxalign dpo`.

    Attributes:
      dpo: the algorithm's options.
      reference_cache: folder for the reference's log-probabilities of all pairs. If missing, they
        are computed before training. During training the reference is then not in memory. None: the
        reference runs on every batch.
    """

    dpo: dpo.Config = dpo.Config()
    reference_cache: str | None = None

    algorithm: ClassVar[str] = "dpo"
    data_options: ClassVar[tuple[str, ...]] = ("shared_prefix",)

    def __post_init__(self):
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
        super().__post_init__()

    @property
    def reads_reference(self) -> bool:
        """False if the reference is cached or the loss has none."""
        return self.dpo.has_reference and self.reference_cache is None
