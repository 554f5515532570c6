"""Plans of an 8B model on six topologies, compiled one after the other, as a table.

    python scripts/plan/table.py [--only sft-v5e-16 …] [--out docs/results/plans.jsonl] [--again]

Each row is the command a user types, in a process of its own, so that its memory can be told. A row
that the file has is not compiled again. Needs the compilers (`pip install
"jaxalign[plan-tpu,plan-gpu]"`) and minutes a row, no accelerator.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = ROOT / "configs/recipes/llama-3.1-8b"

# What is changed of a recipe for a topology that is not its own: rows that divide over the chips,
# micro-batches of a row or two a chip, less memory where there is little.
SMALL = ["optimizer.moments=int8", "model.dtype=bfloat16"]
# A rollout whose weights no chip has to gather for every token that it writes.
WHOLE = ["mesh.rules_of.rollout.embed=null"]
FOURTHS = ["mesh.tensor=4", *WHOLE]
ROWS: dict[str, list[str]] = {
    "sft-v5e-16": ["run.micro_batches=8", *SMALL],
    "sft-v5p-8": ["run.micro_batches=16"],
    "sft-v5p-128": ["run.micro_batches=2"],
    "sft-v6e-256": ["data.rows=256", "run.micro_batches=1"],
    "sft-v5p-4096": ["data.rows=2048", "run.micro_batches=1", "mesh.data=32"],
    "sft-h100:8": ["run.micro_batches=8"],
    "dpo-v5e-16": ["run.micro_batches=8", *SMALL],
    "dpo-v5p-8": ["run.micro_batches=16"],
    "dpo-v5p-128": ["run.micro_batches=2"],
    "dpo-v6e-256": ["data.rows=256", "run.micro_batches=1"],
    "dpo-v5p-4096": ["data.rows=2048", "run.micro_batches=1", "mesh.data=32"],
    "dpo-h100:8": ["run.micro_batches=8"],
    "ppo-v5e-16": ["data.rows=128", "run.micro_batches=32", *SMALL, *FOURTHS],
    "ppo-v5p-8": ["data.rows=128", "run.micro_batches=16", "optimizer.moments=bfloat16"],
    "ppo-v5p-128": ["run.micro_batches=4", *WHOLE],
    "ppo-v6e-256": ["run.micro_batches=2", *FOURTHS],
    "ppo-v5p-4096": ["data.rows=2048", "run.micro_batches=1", "mesh.data=32", *WHOLE],
    "ppo-h100:8": ["data.rows=256", "run.micro_batches=16", "optimizer.moments=bfloat16"],
}
MEMORY = ("params", "optimizer", "models", "batch", "cache", "temporary", "other", "total")


def compile_row(name: str, overrides: list[str]) -> dict:
    algorithm, _, topology = name.partition("-")
    command = [
        sys.executable,
        "-m",
        "jaxalign",
        "plan",
        str(RECIPES / f"{algorithm}.yaml"),
    ]
    command += [*overrides, "--topology", topology, "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    busy, began = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(command, env=environment, stdout=told, stderr=complaints)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        complaints.seek(0)
        text, complaint = told.read(), complaints.read()
    row = {
        "name": name,
        "algorithm": algorithm,
        "topology": topology,
        "overrides": overrides,
        # On a busy machine the first says little; the second is what the work takes of the cores.
        "wall_seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "load_before": round(busy, 1),
        "host_gib": round(used.ru_maxrss / 2**20, 2),
    }
    if process.returncode:
        return row | {"refused": (complaint.strip().splitlines() or ["no word"])[-1]}
    plan = json.loads(text)
    costs, speed = plan["costs"], plan["speed"]
    sent = costs["collectives"].values()
    return row | {
        "devices": plan["devices"],
        "mesh": plan["mesh"],
        "compile_seconds": round(plan["compile_seconds"], 1),
        "programs": {one["name"]: round(one["seconds"], 1) for one in plan["programs"]},
        "memory_gib": {kind: round(plan[kind] / 2**30, 2) for kind in MEMORY},
        "capacity_gib": round(plan["capacity"] / 2**30, 2),
        "fits": plan["fits"],
        "peak": plan["peak"],
        "tflop": round(costs["flops"] / 1e12, 2),
        "gb_moved": round(costs["bytes"] / 1e9, 2),
        "gb_inner": round(sum(kind["inner"] for kind in sent) / 1e9, 2),
        "gb_outer": round(sum(kind["outer"] for kind in sent) / 1e9, 2),
        "seconds": speed["seconds"],
        "tokens_per_second": round(speed["tokens_per_second"]),
        "mfu": round(speed["mfu"], 3),
    }


def read(path: pathlib.Path) -> dict[str, dict]:
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def show(rows: dict[str, dict]) -> str:
    heads = ("run", "GiB a device", "most in", "GB sent", "at best", "MFU", "CPU time", "host")
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name in ROWS:
        row = rows.get(name)
        if row is None:
            continue
        if "refused" in row:
            lines.append(f"| {name} | {row['refused']} |")
            continue
        lines.append(
            f"| {row['algorithm']} {row['topology']} | {row['memory_gib']['total']:.1f} of "
            f"{row['capacity_gib']:.1f} | {row['peak']} | {row['gb_inner'] + row['gb_outer']:.1f} "
            f"| {row['seconds']:.3g} s | {100 * row['mfu']:.0f} % | {row['cpu_seconds']:.0f} s "
            f"| {row['host_gib']:.1f} GiB |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/results/plans.jsonl")
    parser.add_argument("--again", action="store_true", help="compile rows that are there too")
    # What was refused is tried again in any case.
    parsed = parser.parse_args()
    for name in parsed.only:
        rows = read(parsed.out)
        if name in rows and "refused" not in rows[name] and not parsed.again:
            continue
        rows[name] = compile_row(name, ROWS[name])
        print(json.dumps(rows[name]), file=sys.stderr, flush=True)
        text = "".join(json.dumps(rows[key]) + "\n" for key in ROWS if key in rows)
        parsed.out.write_text(text, "utf-8")
    print(show(read(parsed.out)))


if __name__ == "__main__":
    main()
