"""Converts TRL's arguments to our configuration, with the same checks as `jaxalign`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.commands.convert_trl.conversion import Conversion, Note
from jaxalign.commands.convert_trl.rules import (
    convert_batches,
    convert_data,
    convert_model,
    convert_optimizer,
    convert_run,
)
from jaxalign.commands.convert_trl.table import SECTIONS, arguments
from jaxalign.commands.convert_trl.trainers import convert_trainer

COMMANDS = {"grpo": "ppo", "rloo": "ppo"} | {
    name: name for name in ("sft", "reward", "dpo", "kto", "ppo")
}
"""Trainer → the command that runs its configuration."""


_ONLY = {
    "sft": "packing packing_strategy eval_packing completion_only_loss assistant_only_loss",
    "grpo": "loss_type delta scale_rewards importance_sampling_level entropy_coef",
    "rloo": "normalize_advantages reward_clip_range",
}
"""Trainer → arguments that it alone has, of those in a section with others'."""
_LOSSES = {
    "sft": {"nll", "dft", "chunked_nll"},
    "kto": {"kto", "apo_zero_unpaired"},
    "grpo": {"grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"},
}


def find_trainer(given: Mapping[str, Any]) -> str:
    """The trainer that has these arguments.

    Raises:
      ValueError: they fit several, or none.
    """
    fit = set(SECTIONS)
    for name in given:
        owners = {trainer for trainer in SECTIONS if name in arguments(trainer)}
        for trainer, names in _ONLY.items():
            if name in names.split():
                owners -= {"grpo", "rloo"} - {trainer} if trainer != "sft" else owners - {"sft"}
        fit &= owners or fit
    kinds = given.get("loss_type")
    if kinds is not None:
        kinds = {str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])}
        fit &= {trainer for trainer, known in _LOSSES.items() if kinds & known} or {"dpo"}
    if len(fit) != 1:
        names = ", ".join(name for name in SECTIONS if name in fit) or "no single trainer"
        raise ValueError(
            f"the arguments fit {names}; say whose they are with --as: {', '.join(SECTIONS)}"
        )
    return fit.pop()


def convert(
    given: Mapping[str, Any], trainer: str, processes: int = 1
) -> tuple[dict[str, Any], list[Note]]:
    """Our configuration for TRL's arguments, and what could not be converted.

    Args:
      given: TRL's arguments by name.
      trainer: a key of `table.SECTIONS`.
      processes: the number of devices TRL ran on; its batch is the batch per device times this.

    Raises:
      ValueError: invalid values; one message has all of them.
    """
    from jaxalign.run.config.runs import load_config

    conversion = Conversion(trainer, given, processes)
    for rule in (convert_model, convert_data, convert_batches, convert_run):
        rule(conversion)
    convert_trainer(conversion)
    convert_optimizer(conversion)
    conversion.rest()
    try:
        load_config(COMMANDS[trainer], conversion.values)
    except ValueError as error:
        raise ValueError(f"the converted configuration is not valid: {error}") from None
    return conversion.values, conversion.notes
