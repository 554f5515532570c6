"""What a configuration may say of a reference, the same for all that have one."""

from __future__ import annotations

from typing import Any

from jaxalign.run.config.data import want


def check_sync(config: Any) -> None:
    """Refuses a reference that cannot follow: a whole one of adapters, one that lies otherwise."""
    want(
        config.reference_sync is None or "reference" not in config.mesh.rules_of,
        "reference_sync",
        config.reference_sync,
        "null with mesh.rules_of.reference: a reference that moves lies as the policy does",
    )
    want(
        config.reference_sync is None or config.reference is None or config.model.lora is None,
        "reference_sync",
        config.reference_sync,
        "null with both a reference and model.lora: adapters cannot be moved towards whole weights",
    )


def check_offload(config: Any, *, held: bool) -> None:
    """Refuses to move a reference out of the way that is not there.

    Args:
      config: of a preference run.
      held: whether its reference is asked at every batch.
    """
    apart = config.reference is not None or "reference" in config.mesh.rules_of
    own = apart or config.model.lora is None
    want(
        not config.offload_frozen or (held and own and config.reference_sync is None),
        "offload_frozen",
        config.offload_frozen,
        "false: no reference is held beside the step (it is cached, follows the policy, is the "
        "base under adapters, or there is none)",
    )
