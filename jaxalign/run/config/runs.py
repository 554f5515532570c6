"""A run's configuration: frozen dataclasses that check themselves.

Every option is a field of one dataclass, here or in an algorithm's `Config`, and defaults are
defined nowhere else. `run.config.yaml` builds them from YAML and `key=value` overrides.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxalign.run.config.base import ModelConfig, Run, RunConfig
from jaxalign.run.config.data import DataConfig
from jaxalign.run.config.dpo import DPORun
from jaxalign.run.config.kto import KTORun
from jaxalign.run.config.mesh import MeshConfig
from jaxalign.run.config.ppo import PPORun
from jaxalign.run.config.reward import RewardRun
from jaxalign.run.config.sft import SFTRun
from jaxalign.run.config.yaml import build, override, read_yaml

__all__ = [
    "RUNS",
    "DPORun",
    "DataConfig",
    "KTORun",
    "MeshConfig",
    "ModelConfig",
    "PPORun",
    "RewardRun",
    "Run",
    "RunConfig",
    "SFTRun",
    "algorithm_of",
    "load_config",
]

RUNS: dict[str, type[Run]] = {
    run.algorithm: run for run in (SFTRun, RewardRun, DPORun, KTORun, PPORun)
}
"""Algorithm → its configuration class. `jaxalign.run.tasks.register` adds others."""


def load_config(
    algorithm: str, source: str | pathlib.Path | Mapping[str, Any], assignments: Sequence[str] = ()
) -> Any:
    """The checked configuration of one run.

    Args:
      algorithm: "sft", "reward", "dpo", "kto" or "ppo".
      source: YAML file, or nested values.
      assignments: `key=value` overrides.

    Raises:
      ValueError: all problems at once: unknown keys (with the nearest valid one), missing keys,
        values of a wrong type or out of range.
    """
    if algorithm not in RUNS:
        raise ValueError(f"algorithm={algorithm!r}: wanted one of {', '.join(RUNS)}")
    values = source if isinstance(source, Mapping) else read_yaml(source)
    values = override(values, assignments)
    try:
        return build(RUNS[algorithm], values)
    except ValueError as error:
        others = [name for name in RUNS if name in values and name != algorithm]
        if "stages" in values:
            others = ["pipeline"]
        if len(others) != 1 or algorithm in values:
            raise
        raise ValueError(
            f"{error}\n  this looks like a configuration of `jaxalign {others[0]}`; wanted one of "
            f"`jaxalign {algorithm}`"
        ) from None


def algorithm_of(values: Mapping[str, Any], remedy: str) -> str:
    """Which algorithm a YAML is for: the one whose section it has.

    Args:
      values: nested values.
      remedy: what to do if the algorithm is unclear, for the message.

    Raises:
      ValueError: no section of an algorithm, several, or a pipeline.
    """
    found = [name for name in RUNS if name in values]
    if len(found) == 1:
        return found[0]
    if "stages" in values:
        raise ValueError("config: this is a pipeline; give the YAML of one of its stages")
    got = " and ".join(found) if found else "no section of an algorithm"
    raise ValueError(f"config: got {got}, so the algorithm is not known; {remedy}")
