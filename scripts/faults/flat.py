"""Memory, open files and compiled programs of long runs: they should not grow.

    python scripts/faults/flat.py [--sft 2000] [--ppo 300] [--only sft] [--out FILE.json]

Trains SFT and PPO on a tiny model, with twenty checkpoints and ten evaluations over the run, and
reads the process's resident memory and open files from outside. Compares the medians of the middle
third of the steps and of the last third: by then nothing is compiled, read or filled for the first
time any more.

Exits with status 1 if memory or open files grew by more than 2 %, or a step was compiled again.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from typing import Any

import _runs

_MOST = 0.02
_EVERY = 0.2  # seconds between two looks
_PARTS = 10


def main() -> int:
    """Runs both; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sft", type=int, default=2000, help="steps")
    parser.add_argument("--ppo", type=int, default=300, help="iterations")
    parser.add_argument("--only", choices=("sft", "ppo"))
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = pathlib.Path(name)
        _runs.prepare_environment(place)
        models = _runs.make_models(place)
        head = {"python": platform.python_version(), "jax": importlib.metadata.version("jax")}
        results = []
        for kind, steps in (("sft", options.sft), ("ppo", options.ppo)):
            if options.only in (None, kind):
                results.append(watch(kind, steps, models, place / kind))
                print(json.dumps(results[-1]), flush=True)
                if options.out is not None:
                    _runs.write_json(options.out, head, "runs", results)
    return int(not all(result["flat"] for result in results))


def watch(kind: str, steps: int, models: pathlib.Path, place: pathlib.Path) -> dict[str, Any]:
    """Runs one, and looks at it again and again."""
    place.mkdir()
    folder, path = place / "run", place / "run.yaml"
    plan = {"save_every": steps // 20, "eval_every": steps // 10, "log_every": steps}
    path.write_text(json.dumps(_runs.settings(kind, models, folder, steps=steps, **plan)))
    child = _runs.Child(_runs.command(kind, str(path)), place / "log")
    seen: list[tuple[int, float, int]] = []
    metrics = folder / "metrics.jsonl"
    while child.poll() is None:
        time.sleep(_EVERY)
        try:
            seen.append((count_lines(metrics), *look(child.pid)))
        except OSError:
            continue  # it has just ended, or has no file yet
    ended = child.wait()
    if ended.status:
        raise RuntimeError(ended.log)
    rows = [row for row in _runs.rows(metrics) if "compiles" in row]
    return summary(kind, steps, seen) | {
        "seconds": round(ended.seconds),
        "compiles_first": rows[0]["compiles"],
        "compiles_last": rows[-1]["compiles"],
        "flat": is_flat(seen) and rows[len(rows) // 3]["compiles"] == rows[-1]["compiles"],
    }


def look(pid: int) -> tuple[float, int]:
    """Resident memory in MiB, and the number of open files."""
    pages = int(pathlib.Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def count_lines(path: pathlib.Path) -> int:
    """How many lines a file has."""
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


Seen = list[tuple[int, float, int]]
"""(lines of metrics, MiB, open files) of every look."""


def medians(seen: Seen, part: int, parts: int) -> tuple[float, float]:
    """Medians of memory and open files over a part of the lines, counted from 0."""
    last = seen[-1][0]
    bounds = (part * last / parts, (part + 1) * last / parts)
    inside = [row for row in seen if bounds[0] < row[0] <= bounds[1]] or [seen[-1]]
    return statistics.median(row[1] for row in inside), statistics.median(row[2] for row in inside)


def growth(seen: Seen) -> tuple[float, float]:
    """By how much the last third's medians are above the middle third's, as fractions."""
    middle, late = medians(seen, 1, 3), medians(seen, 2, 3)
    return late[0] / middle[0] - 1, late[1] / middle[1] - 1


def is_flat(seen: Seen) -> bool:
    """Whether neither grew by more than 2 %."""
    return max(growth(seen)) <= _MOST


def summary(kind: str, steps: int, seen: Seen) -> dict[str, Any]:
    """Memory and files over the run."""
    parts = [medians(seen, part, _PARTS) for part in range(_PARTS)]
    memory, files = growth(seen)
    return {
        "run": kind,
        "steps": steps,
        "looks": len(seen),
        "mib": [round(part[0], 1) for part in parts],
        "open_files": [part[1] for part in parts],
        "most_open_files": max(row[2] for row in seen),
        "memory_growth_percent": round(100 * memory, 2),
        "open_files_growth_percent": round(100 * files, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
