"""A run's peak memory usage, for `jaxalign report`."""

from __future__ import annotations

import contextlib
import json
import pathlib
import resource
import sys

import jax

from jaxalign.data.bounds import read_json_file
from jaxalign.data.paths import replace_text
from jaxalign.parallel import distributed
from jaxalign.run.record import RECORD

USAGE = "usage.json"
"""File of a run's folder, in bytes: `host_bytes` of process 0, `device_bytes` of its fullest device
where the device counts them. A resumed run keeps the larger ones."""


def write_usage(folder: pathlib.Path) -> None:
    """Writes the peaks so far. On a full disk the old file stays and the run continues.

    Nothing is written without the run's record: its folder was moved, and another took its place.
    """
    if not distributed.is_main() or not (folder / RECORD).exists():
        return
    path = folder / USAGE
    with contextlib.suppress(OSError):
        peaks = {"host_bytes": _host_bytes()} | _device_bytes()
        replace_text(path, json.dumps(_larger(path, peaks)) + "\n")


def _host_bytes() -> int:
    """The peak of the whole process, including anything else it did."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _device_bytes() -> dict[str, int]:
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {"device_bytes": max(peaks)} if peaks else {}


def _larger(path: pathlib.Path, peaks: dict[str, int]) -> dict[str, int]:
    """The larger of these peaks and those of an earlier start."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for name, value in read_json_file(path).items():
            if isinstance(value, int):
                peaks[name] = max(value, peaks.get(name, 0))
    return peaks
