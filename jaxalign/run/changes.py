"""The differences between a resumed run and the original, option by option."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxalign.algorithms.optim import OptimizerConfig
from jaxalign.run.config.base import Run
from jaxalign.run.config.runs import load_config
from jaxalign.run.config.yaml import to_values

FREE = (
    *("run.folder", "run.log_every", "run.eval_every", "run.eval_tasks"),
    *("run.save_every", "run.save_minutes"),
    *("run.keep", "run.keep_best", "run.time_limit", "run.early_stopping", "run.export"),
    *(
        "run.checkpoint",
        "run.micro_batches",
        "mesh",
        "model.remat",
        "model.attention",
        "offload_frozen",
    ),
    *("optimizer.offload", "critic_optimizer.offload", "reference_cache", "data.prefetch"),
    *("ptx.prefetch", "dump_every", "dump_samples"),
    *("run.trackers", "run.trackers_optional", "run.tracker_project"),
)
"""Options and sections that do not change training (beyond rounding)."""

LAYOUT = (
    *("run.micro_batches", "mesh", "model.remat", "model.attention", "offload_frozen"),
    *("optimizer.offload", "critic_optimizer.offload", "reference_cache"),
)
"""Options of `FREE` that may change the last bits."""

_BY_TEXT = {"model.tokenizer": "tokenizer", "model.chat_template": "chat_template"}
"""Options that are compared by the files they name, once those are read."""

ONCE = ("resume", "allow_changes", "overwrite")
"""Options of `run` that apply to a single start."""

_LENGTH = ("run.steps", "run.epochs", "data.epochs")
"""Options that set the length of a run; the total number of batches is compared instead."""

STEPS = "steps in all"
"""The name of a change of that number if training does not depend on it."""

_SKIPPED = tuple(f"run.{name}" for name in ONCE)
_DIGEST, _DIGEST_SHOWN = re.compile("[0-9a-f]{64}"), 12
CONTENTS = " (contents)"
"""Appended to the option's name if its files' contents have changed."""


class Change(NamedTuple):
    """An option whose value has changed, or whose files' contents have."""

    name: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.old)} → {_short(self.new)}"


class Changes(NamedTuple):
    """What is different.

    Attributes:
      binding: changes that affect training.
      free: changes that do not.
    """

    binding: list[Change]
    free: list[Change]


def config_changes(
    config: Run,
    old_values: Mapping[str, Any],
    inputs: Mapping[str, str],
    old_inputs: Mapping[str, str],
) -> Changes:
    """Compares configurations, and the files that they name.

    A different path with the same contents is not a change.

    Args:
      config: the run's config.
      old_values: nested values of the earlier configuration.
      inputs: the run's inputs, see `run.inputs`.
      old_inputs: the earlier inputs.
    """
    new, old = flat_values(to_values(config)), flat_values(_with_defaults(config, old_values))
    found = Changes([], [])
    shown = set()
    for name in dict.fromkeys((*new, *old)):
        if new.get(name) == old.get(name) or name in _LENGTH or name in _SKIPPED:
            continue
        change = Change(name, old.get(name), new.get(name))
        same = name in inputs and inputs[name] == old_inputs.get(name)
        by_text = _BY_TEXT.get(name) in old_inputs
        (found.free if same or by_text or is_free(name) else found.binding).append(change)
        shown.add(name)
    found.binding.extend(
        change
        for change in input_changes(inputs, old_inputs)
        if change.name.removesuffix(CONTENTS) not in shown
    )
    return found


def input_changes(new: Mapping[str, str], old: Mapping[str, str]) -> list[Change]:
    """Inputs known for both runs that differ."""
    return [
        Change(name + (CONTENTS if _DIGEST.fullmatch(digest) else ""), old[name], digest)
        for name, digest in new.items()
        if name in old and old[name] != digest
    ]


def length_change(config: Run, old_total: int | None, total: int) -> Changes:
    """A changed number of batches, which matters if a schedule ends with the run."""
    if old_total is None or old_total == total:
        return Changes([], [])
    bound = [
        f"{name}.schedule={optimizer.schedule}"
        for name in ("optimizer", "critic_optimizer")
        if isinstance(optimizer := getattr(config, name, None), OptimizerConfig)
        and (optimizer.schedule != "constant" or optimizer.warmup_ratio)
        and optimizer.total_steps is None
    ]
    if not bound:
        return Changes([], [Change(STEPS, old_total, total)])
    name = f"{STEPS}, with which {' and '.join(bound)} ends"
    return Changes([Change(name, old_total, total)], [])


def flat_values(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values as `{"data.rows": 8, "data.train[0].path": …}`."""
    return dict(_leaves(json.loads(json.dumps(values, default=str)), name))


def _leaves(values: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(values, list) and (
        name.endswith((".train", ".eval")) or any(isinstance(value, dict) for value in values)
    ):
        for number, value in enumerate(values):
            # A source of data is a path, or a section with one.
            value = {"path": value} if isinstance(value, str) else value
            yield from _leaves(value, f"{name}[{number}]")
    elif values is not None:
        yield name, values


def _with_defaults(config: Run, old: Mapping[str, Any]) -> Mapping[str, Any]:
    """Earlier values, with defaults for options that were added later."""
    try:
        return to_values(load_config(type(config).algorithm, old))
    except ValueError:  # another algorithm, or an option that no longer exists
        return old


def is_free(name: str) -> bool:
    """Whether an option does not affect training, see `FREE`."""
    return any(name == free or name.startswith(f"{free}.") for free in FREE)


def _short(value: Any) -> str:
    if isinstance(value, str) and _DIGEST.fullmatch(value):
        return f"{value[:_DIGEST_SHOWN]}…"
    return "null" if value is None else str(value)
