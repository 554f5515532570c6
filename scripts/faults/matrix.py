"""Lets one thing after the other go wrong in runs, and tells what happened and what was lost.

    python scripts/faults/matrix.py [--only WORD] [--out FILE.json]

Storage that is full, read-only, limited or gone, for a while or for good; damaged checkpoints at a
resume; weights, rewards and servers that misbehave; files made to be expensive; signals; two runs
in a folder; a device out of memory. `_matrix_faults.py` has each. Runs are tiny, in forks of a
loaded process; the waits between two tries of storage are a twentieth of the real ones.

Of each fault: the exit status, the last line of the message, seconds, how many more than an
undisturbed run it waited and worked, resident memory at most, and what was lost: where the run can
go on afterwards, it does, and its metrics and weights are compared with those of an uninterrupted
run. Other work on the machine counts as waiting: run it where nothing else runs.

With `--out`, a file is continued: what went as expected is not done again.

Exits with status 1 for a traceback, another status than the one expected, something lost, a process
that waited or worked more than 5 s longer than an undisturbed run, or one above 1 GiB.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import pathlib
import platform
import sys
import tempfile
import time
from typing import Any

import _runs

_PEAK = 1024.0  # MiB


def main() -> int:
    """Runs all of it; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="faults whose name holds this")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        _runs.prepare_environment(pathlib.Path(place))
        import _matrix_faults
        from _bench import FAULTS, Bench

        _ = _matrix_faults  # fills the table
        bench = Bench(pathlib.Path(place))
        results: list[dict[str, Any]] = []
        failed = False
        if options.out is not None and options.out.exists():
            results = json.loads(options.out.read_text())["results"]
        known = {found["fault"] for found in results if found["ok"]}
        results = [found for found in results if found["ok"]]
        for name, fault in FAULTS.items():
            if name in known or (options.only is not None and options.only not in name):
                continue
            began = time.monotonic()
            try:
                outcome = fault(bench, bench.folder(name))
            except Exception as error:  # the script's own: the other faults still count
                print(f"{name}: {error!r}", flush=True)
                failed = True
                continue
            found = {"fault": name} | outcome.summary(bench.place)
            found["ok"] = outcome.ok and outcome.ended.peak <= _PEAK
            found["seconds_in_all"] = round(time.monotonic() - began, 1)
            results.append(found)
            print(json.dumps(found), flush=True)
            if options.out is not None:
                write(options.out, results)
    return int(failed or any(not found["ok"] for found in results))


def write(path: pathlib.Path, results: list[dict[str, Any]]) -> None:
    """Writes counts, then a line for each fault."""
    head = {
        "python": platform.python_version(),
        "jax": importlib.metadata.version("jax"),
        "faults": len(results),
        "as_expected": sum(found["ok"] for found in results),
        "tracebacks": sum(found["traceback"] for found in results),
        "waited_longer_at_most": max((found["waited_longer"] for found in results), default=0.0),
        "worked_longer_at_most": max((found["worked_longer"] for found in results), default=0.0),
        "above_1_gib": sum(found["peak_mib"] > _PEAK for found in results),
        "something_lost": sum(found["lost"] not in ("nothing", "") for found in results),
    }
    _runs.write_json(path, head, "results", results)


if __name__ == "__main__":
    sys.exit(main())
