"""Speed and memory of SFT beside TRL and Tunix: full and ragged rows, in one run.

    TRL=$(bash scripts/bench/_peers.sh trl-1.16.0)
    TUNIX=$(bash scripts/bench/_peers.sh tunix-0.1.7)
    python scripts/bench/sft_speed.py --trl $TRL --tunix $TUNIX --work FOLDER \
        --out docs/results/sft_speed.jsonl

A random Llama (`--sizes S M`: vocabulary 8192, hidden 256, 4 layers; 32000, 512, 8 layers), steps
of 8 × 256 tokens, float32, AdamW. Full: every document has 256 tokens. Ragged: lengths uniform from
32 to 256, documents kept apart; TRL padded (8 documents a step) and packed by its "bfd" (8 rows of
256), Tunix padded (its SFT has no packing), ours packed (4 rows of 512). All run in turn, each time
in a fresh process; figures are medians over the repeats. Speed counts real tokens; the first pass
over the batches, in which JAX compiles, is left out. The share of the limit is that of the model
FLOPs in the best rate of a float32 matrix product, measured by ours in the same run. TRL runs
without gradient checkpointing, and glibc keeps its memory (`_job.ALLOCATOR`). Tunix has weights of
its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from typing import Any

import jax
from _job import append, carry_out, machine, read_steps, write_job
from _sft import Texts

SCRIPTS = {"trl_padded": "_sft_trl.py", "trl_bfd": "_sft_trl.py", "tunix": "_sft_tunix.py"}
SCRIPTS["sft_ours"] = "_sft_ours.py"


def sides_of(arguments: argparse.Namespace, kind: str) -> dict[str, str]:
    """Side → interpreter, ours last."""
    sides = {}
    if arguments.trl is not None:
        sides["trl_padded"] = arguments.trl
        if kind == "ragged":
            sides["trl_bfd"] = arguments.trl
    if arguments.tunix is not None:
        sides["tunix"] = arguments.tunix
    return sides | {"sft_ours": sys.executable}


def make_job(arguments: argparse.Namespace, size: str, kind: str) -> Texts:
    """Writes the weights of a size, once; gives the job."""
    from _start import SIZES, random_llama, save_start

    folder = arguments.work.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return Texts(
        kind=kind,
        size=size,
        shape=SIZES[size],
        model=save_start("sft", *random_llama(size), folder / f"policy-{size}"),
        passes=1 + arguments.passes,
        row_group=arguments.row_group,
        threads=arguments.threads,
    )


def flops_of(job: Texts, lengths: list[int]) -> float:
    """Model FLOPs of a step over documents of these lengths; the last token has no target."""
    from _start import shape_of

    from jaxalign.models.flops import Work, forward_flops

    pairs = sum(n * (n + 1) / 2 for n in lengths)
    work = Work(sum(lengths), pairs, sum(lengths) - len(lengths))
    return 3 * forward_flops(shape_of(job.size), work)


def measure(arguments: argparse.Namespace, case: pathlib.Path, job: Texts) -> dict[str, Any]:
    """Runs all sides in turn, several times."""
    sides = sides_of(arguments, job.kind)
    found: dict[str, Any] = {
        side: {"tokens_a_second": [], "flops_a_second": [], "peak_mib": []} for side in sides
    }
    for repeat in range(arguments.repeats):
        folder = case / f"repeat-{repeat}"
        write_job(folder, job)
        for side, python in sides.items():
            done = carry_out(side, python, folder, job.threads, script=SCRIPTS[side])
            steps = read_steps(folder / side / "steps.jsonl")[done["batches"] :]
            seconds = sum(step["seconds"] for step in steps)
            tokens = sum(step["tokens"] for step in steps)
            flops = sum(flops_of(job, step["lengths"]) for step in steps)
            found[side]["tokens_a_second"].append(round(tokens / seconds, 1))
            found[side]["flops_a_second"].append(round(flops / seconds))
            found[side]["peak_mib"].append(done["peak_mib"])
            found[side]["versions"] = done["versions"]
            if "matmul_flops" in done:
                found.setdefault("matmul_flops", []).append(round(done["matmul_flops"]))
    return found


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians; ours against the fastest peer, and against the least memory of a peer."""
    limit = max(found["matmul_flops"])
    sides = [side for side in found if side != "matmul_flops"]
    median = {
        side: {k: statistics.median(v) for k, v in found[side].items() if k != "versions"}
        for side in sides
    }
    for figures in median.values():
        figures["of_limit"] = round(figures.pop("flops_a_second") / limit, 3)
    ours = median["sft_ours"]
    ratios = {
        side: {
            "speed": round(ours["tokens_a_second"] / figures["tokens_a_second"], 3),
            "memory": round(ours["peak_mib"] / figures["peak_mib"], 3),
        }
        for side, figures in median.items()
        if side != "sft_ours"
    }
    return {"ratios": ratios, "matmul_gflops": round(limit / 1e9, 1), "median": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", help="interpreter of TRL's environment")
    parser.add_argument("--tunix", help="interpreter of Tunix's environment")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--kinds", nargs="+", default=["full", "ragged"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="over the batches, measured")
    parser.add_argument("--row-group", type=int, default=0, help="ours: rows computed at a time")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    cases = [(size, kind) for size in arguments.sizes for kind in arguments.kinds]
    # The weights are made here, and this process then only waits.
    jobs = [make_job(arguments, *case) for case in cases]
    jax.clear_caches()
    for (size, kind), job in zip(cases, jobs, strict=True):
        found = measure(arguments, arguments.work.absolute() / f"sft-{size}-{kind}", job)
        row = {"benchmark": "sft_speed", "size": size, "rows": kind, **summary(found)}
        print(json.dumps(row))
        row |= {"job": dataclasses.asdict(job), "repeats": found}
        row |= machine(sides_of(arguments, kind), arguments.threads)
        del row["job"]["model"]  # where it lay is of no interest
        if arguments.out is not None:
            append(arguments.out, row)


if __name__ == "__main__":
    main()
