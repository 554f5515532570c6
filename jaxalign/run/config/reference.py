"""The options of the reference, shared by all preference runs."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxalign.algorithms.moving_reference import ReferenceSync
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import want


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceRun(Run):
    """A run whose loss compares the policy with a reference.

    Attributes:
      reference: the frozen reference model; None: the starting model itself.
      reference_sync: lets the reference follow the policy (TR-DPO); None: it is frozen.
      offload_frozen: keep the reference in the host's memory except while it is read.
    """

    reference: str | None = None
    reference_sync: ReferenceSync | None = None
    offload_frozen: bool = False

    models_with_rules: ClassVar[tuple[str, ...]] = ("reference",)

    def __post_init__(self):
        super().__post_init__()
        self._check_sync()
        self._check_offload()

    @property
    def reads_reference(self) -> bool:
        """Whether the reference runs on every batch: it is neither cached nor absent."""
        return True

    @property
    def frozen_models(self) -> dict[str, str]:
        """Also includes the reference, unless it moves and is therefore in the checkpoint."""
        if not self.reads_reference or self.reference_sync is not None:
            return super().frozen_models
        start = {"model.source": self.model.source}
        named = start if self.reference is None else {"reference": self.reference}
        return super().frozen_models | named

    def _check_sync(self) -> None:
        """A moving reference has the policy's layout, and is whole where the policy is whole."""
        want(
            self.reference_sync is None or "reference" not in self.mesh.rules_of,
            "reference_sync",
            self.reference_sync,
            "null with mesh.rules_of.reference: a reference that moves lies as the policy does",
        )
        want(
            self.reference_sync is None or self.reference is None or self.model.lora is None,
            "reference_sync",
            self.reference_sync,
            "null with both a reference and model.lora: adapters cannot be moved towards whole "
            "weights",
        )

    def _check_offload(self) -> None:
        """Only parameters that no other model reads can be offloaded."""
        apart = self.reference is not None or "reference" in self.mesh.rules_of
        own = apart or self.model.lora is None
        want(
            not self.offload_frozen
            or (self.reads_reference and own and self.reference_sync is None),
            "offload_frozen",
            self.offload_frozen,
            "false: no reference is held beside the step (it is cached, follows the policy, is the "
            "base under adapters, or there is none)",
        )
