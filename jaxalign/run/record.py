"""The record in a run's folder: configuration, versions, devices, inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import itertools
import json
import pathlib
import platform
import socket
from collections.abc import Mapping
from typing import Any

import jax

from jaxalign.data.bounds import read_json_file
from jaxalign.data.paths import replace_text
from jaxalign.parallel import distributed
from jaxalign.run.changes import ONCE, Change
from jaxalign.run.config.yaml import read_yaml, to_values, yaml_text
from jaxalign.run.digests import file_digest
from jaxalign.run.storage import retry

CONFIG, RECORD, VERSIONS = "config.yaml", "run.json", "versions.json"

_PACKAGES = ("jaxalign", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def check_hosts(folder: pathlib.Path, config: Any) -> None:
    """Checks that all hosts run the same versions and configuration on one shared folder.

    Raises:
      ValueError: something differs; the message names it and the hosts.
    """
    if jax.process_count() > 1:
        distributed.check_consistent("package versions", versions())
        distributed.check_consistent("the configuration", distributed.flatten(to_values(config)))
        distributed.check_shared_folder(folder)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that affect a run's results."""
    packages = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | packages


def write_data_report(folder: pathlib.Path, report: str) -> None:
    """Writes `data.txt`: rows, forms, and how each column was used."""
    if distributed.is_main() and folder.is_dir():
        path = folder / "data.txt"
        retry(lambda: replace_text(path, report + "\n"), str(path), folder)


def environment() -> dict[str, str]:
    """Versions, devices and processes, which affect a run's last bits."""
    devices = jax.devices()
    facts = versions() | {"devices": f"{len(devices)} × {devices[0].device_kind}"}
    if jax.process_count() > 1:
        facts["processes"] = str(jax.process_count())
    return facts


def environment_changes(folder: pathlib.Path) -> list[Change]:
    """Changes in the environment since the last start."""
    path = folder / VERSIONS
    with contextlib.suppress(OSError, ValueError, AttributeError):
        old = read_json_file(path)
        return [
            Change(name, old[name], value)
            for name, value in environment().items()
            if old.get(name, value) != value
        ]
    return []


def read_record(folder: pathlib.Path) -> dict[str, Any] | None:
    """What an earlier start left in `run.json`: `config`, `inputs`, `total`, `starts`; or None.

    Of a run without that file, the configuration in `config.yaml`.

    Raises:
      ValueError: the file is damaged.
    """
    path = folder / RECORD
    if not path.is_file():
        yaml = folder / CONFIG
        return {"config": read_yaml(yaml)} if yaml.is_file() else None
    try:
        record = read_json_file(path)
        if isinstance(record["config"], dict) and isinstance(record["starts"], list):
            return record
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path} is damaged, so that nobody can tell what the run was begun with; remove it, and "
        f"{CONFIG} beside it serves instead"
    )


def is_ours(folder: pathlib.Path) -> bool:
    """Whether a run wrote the folder's `config.yaml` in its current form; True if there is none."""
    path = folder / CONFIG
    if not path.exists():
        return True
    record = read_record(folder) or {}
    return record.get("config_sha256") == file_digest(path)


def write_record(
    folder: pathlib.Path,
    config: Any,
    inputs: Mapping[str, str],
    total: int,
    done: int,
    changes: Mapping[str, Any],
) -> None:
    """Writes `config.yaml`, `versions.json` and `run.json`: everything needed to repeat the run.

    A different `config.yaml` is kept as `config.until-step-N.yaml`.

    Args:
      folder: the run's folder.
      config: this start's config.
      inputs: digests of its inputs, see `run.inputs`.
      total: total batches.
      done: batches done before this start.
      changes: option → [earlier value, value], if the run resumes with other options.
    """
    if not distributed.is_main():
        return
    before = read_record(folder) if done else None
    once = dict.fromkeys(ONCE, False)
    values = to_values(dataclasses.replace(config, run=dataclasses.replace(config.run, **once)))
    path, text = folder / CONFIG, yaml_text(values)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        kept = set_aside(path, f"until-step-{done}")
        print(f"{path}: the one up to step {done} is kept as {kept.name}")
    replace_text(path, text)
    replace_text(folder / VERSIONS, json.dumps(environment(), indent=2) + "\n")
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    start = {"step": done, "time": now, "host": socket.gethostname(), "changes": changes}
    record = {
        "config": values,
        "config_sha256": file_digest(path),
        "inputs": inputs,
        "total": total,
        "starts": [*(before or {}).get("starts", []), start],
    }
    text = json.dumps(record, indent=1, ensure_ascii=False, default=str)
    replace_text(folder / RECORD, text + "\n")


def set_aside(path: pathlib.Path, name: str) -> pathlib.Path:
    """Renames `x.yaml` to `x.NAME.yaml`, or to the first free name of `x.NAME-2.yaml`, …."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    free = (path.with_name(f"{path.stem}.{each}{path.suffix}") for each in names)
    target = next(place for place in free if not place.exists())
    return path.rename(target)
