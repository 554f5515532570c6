"""Times functions that take turns in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def median_times(forms: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each function, after a first round that compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(1 + rounds):
        for name, run in forms.items():
            began = time.perf_counter()
            jax.block_until_ready(run())
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: round(1e3 * statistics.median(times), 2) for name, times in seconds.items()}
