"""The table of trackers: the names of `run.trackers`, and the package that each needs."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxalign.parallel import distributed
from jaxalign.run.trackers.base import TrackedRun, Tracker


class Entry(NamedTuple):
    """An available tracker.

    Attributes:
      package: the package to install.
      module: the package's import name.
      path: `module:class` of its `Tracker`.
    """

    package: str
    module: str
    path: str


_HERE = "jaxalign.run.trackers"

TRACKERS = {
    "tensorboard": Entry("tensorboardX", "tensorboardX", f"{_HERE}.tensorboard:TensorBoard"),
    "trackio": Entry("trackio", "trackio", f"{_HERE}.trackio:Trackio"),
    "wandb": Entry("wandb", "wandb", f"{_HERE}.wandb:WandB"),
    "mlflow": Entry("mlflow", "mlflow", f"{_HERE}.mlflow:MLflow"),
}
"""Name in `run.trackers` → its entry."""


def usable(names: Iterable[str], *, optional: bool) -> list[str]:
    """The chosen trackers whose package is installed; none on processes other than 0.

    Args:
      names: the names in `run.trackers`.
      optional: skip and print a missing tracker, instead of raising an error.

    Raises:
      ValueError: a package is missing; the message names the extra.
    """
    names = list(names) if distributed.is_main() else []
    missing = [name for name in names if importlib.util.find_spec(TRACKERS[name].module) is None]
    if missing:
        packages = " ".join(TRACKERS[name].package for name in missing)
        message = (
            f"run.trackers: {', '.join(missing)} needs what is not installed; "
            f'pip install "jaxalign[track]", or only {packages}'
        )
        if not optional:
            raise ValueError(
                f"{message}; run.trackers_optional=true trains without trackers that are missing"
            )
        print(f"{message}. The run goes on without; metrics.jsonl has all numbers", flush=True)
    return [name for name in names if name not in missing]


def load(name: str) -> Callable[[TrackedRun], Tracker]:
    """The class of a tracker. It imports the tracker's package."""
    module, _, attribute = TRACKERS[name].path.partition(":")
    return getattr(importlib.import_module(module), attribute)
