"""What must be the same on all processes of a job, compared before it costs time."""

from __future__ import annotations

import json
import pathlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxalign.parallel.distributed.collectives import barrier, exchange, is_main
from jaxalign.parallel.distributed.service import who

_MOST = 8
_NETWORK_FOLDER = 30.0  # seconds in which a file on a network folder becomes seen by all


def check_same(what: str, facts: Mapping[str, Any]) -> None:
    """Compares facts between the processes; alone, does nothing.

    Args:
      what: what they are facts about, for the message.
      facts: name → JSON-able value; long values are better given as a hash.

    Raises:
      ValueError: on every process, where one has other facts than process 0: which process and
        machine, which fact, both values.
    """
    if jax.process_count() == 1:
        return
    told = [json.loads(text) for text in exchange(what, json.dumps(dict(facts), sort_keys=True))]
    first = told[0]
    wrong = [
        f"{name} is {other.get(name, 'missing')!r} on {who(index)} and "
        f"{first.get(name, 'missing')!r} on {who(0)}"
        for index, other in enumerate(told)
        for name in sorted(first.keys() | other.keys())
        if other.get(name) != first.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - _MOST} more" if len(wrong) > _MOST else ""
        raise ValueError(
            f"{what} must be the same on all hosts: {'; '.join(wrong[:_MOST])}{more}. Start all "
            "of them from the same files, with the same command, in the same environment"
        )


def check_shared(folder: pathlib.Path) -> None:
    """Checks that all processes see one and the same folder; alone, does nothing.

    Raises:
      ValueError: on every process, where one sees another folder.
    """
    if jax.process_count() == 1:
        return
    mark = folder / f".{exchange('the name of a mark', secrets.token_hex(8))[0]}.mark"
    if is_main():
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    barrier("looking for the run's folder")
    until = time.monotonic() + _NETWORK_FOLDER
    while not (there := mark.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    told = exchange("the run's folder", "there" if there else "not there")
    if is_main():
        mark.unlink()
    missing = [who(i) for i, text in enumerate(told) if text != "there"]
    if missing:
        raise ValueError(
            f"run.folder={str(folder)!r} is not shared: what {who(0)} writes there is not seen by "
            f"{', '.join(missing)}; choose a folder on a file system that all hosts mount"
        )


def flatten(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values as `{"data.rows": 8, …}`, for `check_same`."""
    if not isinstance(values, Mapping):
        return {name: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{name}.{key}" if name else str(key))
    return flat
