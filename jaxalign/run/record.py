"""What a run's folder says of the run: its configuration, versions and devices."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax

from jaxalign.parallel import distributed
from jaxalign.run.config.yaml import to_values, write_yaml

_PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def check_hosts(folder: pathlib.Path, config: Any) -> None:
    """Checks that all hosts run the same versions and configuration on one shared folder.

    Raises:
      ValueError: naming what differs, and on which hosts.
    """
    if jax.process_count() > 1:
        distributed.check_consistent("package versions", versions())
        distributed.check_consistent("the configuration", distributed.flatten(to_values(config)))
        distributed.check_shared_folder(folder)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes."""
    packages = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | packages


def write_record(folder: pathlib.Path, config: Any) -> None:
    """Writes `config.yaml` and `versions.json`: all it takes to do the run again."""
    if not distributed.is_main():
        return
    write_yaml(folder / "config.yaml", config)
    devices = jax.devices()
    facts = versions() | {"devices": f"{len(devices)} × {devices[0].device_kind}"}
    if jax.process_count() > 1:
        facts["processes"] = str(jax.process_count())
    (folder / "versions.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
