"""Consistency checks: what must be equal on all processes, compared before training starts."""

from __future__ import annotations

import json
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxalign.parallel.distributed.collectives import all_gather_text, barrier, is_main
from jaxalign.parallel.distributed.service import who

_MAX_SHOWN = 8
_NETWORK_FOLDER = 30.0  # seconds until a network file system shows a new file on every host


def check_consistent(what: str, facts: Mapping[str, Any]) -> None:
    """Compares values between the processes; with one process, does nothing.

    Args:
      what: what the values describe; part of the message.
      facts: name → JSON-able value. Pass a hash in place of a long value.

    Raises:
      ValueError: on every process, if one differs from process 0. The message names process,
        machine, value name and both values.
    """
    if jax.process_count() == 1:
        return
    texts = all_gather_text(what, json.dumps(dict(facts), sort_keys=True))
    values = [json.loads(text) for text in texts]
    first = values[0]
    differences = [
        f"{name} is {other.get(name, 'missing')!r} on {who(index)} and "
        f"{first.get(name, 'missing')!r} on {who(0)}"
        for index, other in enumerate(values)
        for name in sorted(first.keys() | other.keys())
        if other.get(name) != first.get(name)
    ]
    if differences:
        rest = len(differences) - _MAX_SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        raise ValueError(
            f"{what} must be the same on all hosts: {'; '.join(differences[:_MAX_SHOWN])}{more}. "
            "Start all of them from the same files, with the same command, in the same environment"
        )


def check_shared_folder(folder: pathlib.Path) -> None:
    """Checks that all processes see the same folder; with one process, does nothing.

    Process 0 writes a marker file with a random name; every process looks for it.

    Raises:
      ValueError: on every process, if one does not see the marker.
    """
    if jax.process_count() == 1:
        return
    token = all_gather_text("the name of the marker file", secrets.token_hex(8))[0]
    marker = folder / f".{token}.mark"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
    barrier("looking for the run's folder")
    deadline = time.monotonic() + _NETWORK_FOLDER
    while not (visible := marker.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    answers = all_gather_text("the run's folder", "visible" if visible else "missing")
    if is_main():
        marker.unlink()
    missing = [who(index) for index, answer in enumerate(answers) if answer == "missing"]
    if missing:
        raise ValueError(
            f"run.folder={str(folder)!r} is not shared: what {who(0)} writes there is not seen by "
            f"{', '.join(missing)}; choose a folder on a file system that all hosts mount"
        )


def flatten(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values as `{"data.rows": 8, …}`, the form that `check_consistent` compares."""
    if not isinstance(values, Mapping):
        return {name: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{name}.{key}" if name else str(key))
    return flat
