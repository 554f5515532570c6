"""`jaxalign bench`: the speed of training and generation here, compared with the machine's limit.

It measures the library's own steps. Each case (`Case`) runs in its own process, so that its peak
memory is measured alone and a failure does not affect other cases.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxalign.commands.bench.case import ROWS, Case, Runner, Sample, measurable
from jaxalign.commands.bench.machine import (
    Limit,
    counting,
    limit,
    peak_memory,
    reset_peak,
    versions,
)
from jaxalign.commands.bench.sizes import SIZES
from jaxalign.commands.bench.table import show
from jaxalign.commands.startup import huge_pages
from jaxalign.models.backend import recorded_choices
from jaxalign.parallel.mesh import make_mesh

__all__ = [
    "ROWS",
    "SIZES",
    "Case",
    "Runner",
    "Sample",
    "measurable",
    "measure",
    "measure_config",
    "run_case",
    "run_cases",
    "show",
]


def runner_of(case: Case, mesh: Any) -> Runner:
    """The `Runner` of a case."""
    if case.what == "generate":
        from jaxalign.commands.bench.generate import generate_runner as make
    else:
        from jaxalign.commands.bench.runs import case_runner as make
    return make(case, mesh)


def run_case(case: Case) -> dict[str, Any]:
    """Measures a case in this process; returns its record, see `measure`."""
    case = case.resolved()
    mesh = case.mesh()
    with jax.set_mesh(mesh):
        bound = limit(mesh, case.dtype)
    record = measure(lambda: runner_of(case, mesh), bound, case.repeats, case.seconds)
    if "decode_step_bytes" in record and bound.bandwidth is not None:
        rate = record["decode_step_bytes"] / record["decode_step_seconds"] / len(jax.devices())
        record["fraction_of_bandwidth"] = rate / bound.bandwidth
    # JSON has no infinity.
    return {"case": dataclasses.asdict(case) | {"seconds": None}} | record


def measure_config(algorithm: str, config: Any, repeats: int) -> dict[str, Any]:
    """Measures a run's own model and data, from `load_config`, in this process."""
    from jaxalign.commands.bench.runs import config_runner

    mesh = make_mesh(data=-1, fsdp=1)
    dtype = config.model.compute_dtype or "float32"
    record = measure(lambda: config_runner(config), limit(mesh, dtype), repeats)
    data = config.data.layout(default="best_fit" if algorithm == "sft" else None)
    case = {"what": algorithm, "size": config.model.source, "rows": data.rows}
    case |= {"length": data.length, "layout": "packed" if data.packing else "padded"}
    return {"case": case} | record


def measure(
    prepare: Callable[[], Runner],
    bound: Limit,
    repeats: int,
    seconds: float = float("inf"),
) -> dict[str, Any]:
    """Runs a case once to compile, once to warm up, then `repeats` times for the medians.

    Args:
      prepare: makes the case's runner.
      bound: the machine's limit.
      repeats: measured steps.
      seconds: stop measuring after this long, once there were two.

    Returns:
      A record, JSON-able: medians of `tokens_per_second`, `model_flops_per_second`, `step_seconds`
      and `parts`; `fraction_of_limit`; `peak_bytes`; `first_step_seconds`; `compile_seconds`, the
      extra time of the first step over a later one; `compiles`, the programs compiled up to the
      first step, and `recompiles`, after it; `choices`, the platform's choices for its programs;
      devices, date and versions.
    """
    reset_peak()
    with counting() as seen, recorded_choices() as choices:
        start = time.perf_counter()
        runner = prepare()
        ready = time.perf_counter() - start
        start = time.perf_counter()
        runner.run()
        first = time.perf_counter() - start
        runner.run()
        before = seen.programs
        samples: list[Sample] = []
        start = time.perf_counter()
        while len(samples) < repeats:
            samples.append(runner.run())
            if time.perf_counter() - start > seconds and len(samples) >= 2:
                break
        again = seen.programs - before
    memory = peak_memory()
    step = statistics.median(one.seconds for one in samples)
    rate = statistics.median(one.flops / one.seconds for one in samples)
    record = {
        "tokens_per_second": statistics.median(one.tokens / one.seconds for one in samples),
        "model_flops_per_second": rate,
        "limit_flops_per_second": bound.flops,
        "limit": bound.source,
        "fraction_of_limit": rate / bound.flops,
        "step_seconds": step,
        "parts": {
            name: statistics.median(one.parts[name] for one in samples) for name in samples[0].parts
        },
        "padding": statistics.mean(one.padding for one in samples),
        "all_seconds": [round(one.seconds, 6) for one in samples],
        "ready_seconds": ready,
        "first_step_seconds": first,
        "compile_seconds": max(0.0, first - step),
        "backend_compile_seconds": seen.seconds,
        "compiles": before,
        "recompiles": again,
        "choices": sorted(choices),
        **memory,
    }
    if runner.compiles is not None:
        record["step_compiles"] = runner.compiles()
    record |= runner.facts(samples)
    device = jax.devices()[0]
    record |= {"devices": len(jax.devices()), "device": device.device_kind}
    record |= {"processor": platform.processor() or platform.machine()}
    return record | {"date": datetime.date.today().isoformat(), "versions": versions()}


def run_cases(
    cases: Sequence[Case], tell: Callable[[dict[str, Any]], None] = lambda record: None
) -> list[dict[str, Any]]:
    """Measures each case in its own process.

    Args:
      cases: the cases to measure.
      tell: called with each record as it arrives; the record of a failed case has `error` instead.
    """
    # One device uses all cores; the page size is the same as in the commands.
    env = {"JAX_NUM_CPU_DEVICES": "1"} | os.environ | huge_pages.environment()
    records = []
    for case in cases:
        arguments = json.dumps(dataclasses.asdict(case))
        done = subprocess.run(
            [sys.executable, "-m", "jaxalign.commands.bench", arguments],
            capture_output=True,
            text=True,
            env=env,
        )
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            record = json.loads(lines[-1])
        else:
            last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            record = {"case": dataclasses.asdict(case) | {"seconds": None}, "error": last}
        records.append(record)
        tell(record)
    return records
