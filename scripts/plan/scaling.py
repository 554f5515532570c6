"""Weak scaling of an SFT step by its compiled programs: FLOPs and traffic of one device.

    python scripts/plan/scaling.py [--model meta-llama/Llama-3.2-1B] [--tensor 1] [v5e-8 v5e-64 …]

A row of 2,048 tokens a device (a group of `--tensor` devices), layers read anew for the backward
pass. FLOPs should not change with the number of devices; what is sent should be what the formulas
of docs/plan.md say. Ends with an error where FLOPs differ by more than 2 %, or bytes from the
formula by more than 10 %. Rows that OUT has are not compiled again.
"""

import argparse
import json
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxalign.config import load_config
from jaxalign.plan import find_devices, make_plan
from jaxalign.plan.parts import PARTS
from jaxalign.sharding import make_mesh

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 2048
TOPOLOGIES = ["v5e-8", "v5e-64", "v5e-256", "v5p-4096"]


def formula(parts, devices, tensor):
    """Bytes that a device sends: weights gathered twice in bfloat16, gradients scattered once in
    float32 (FSDP); six sums of activations a layer in bfloat16 (tensor, all recomputed)."""
    shape = parts.roles["policy"][0].config
    cut = sum(x.size for x in jax.tree.leaves(parts.params) if x.ndim > 1) / tensor
    shards = devices / tensor
    fsdp = (2 * 2 + 4) * cut * (shards - 1) / shards
    sums = 6 * shape.num_layers * 2 * LENGTH * shape.hidden_size
    return fsdp + 2 * sums * (tensor - 1) / tensor


def compile_row(name, model, tensor):
    devices = find_devices(name)
    values = {
        "model": {"source": model, "remat": "block"},
        "data": {"train": ["absent.jsonl"], "rows": len(devices) // tensor, "length": LENGTH},
        "run": {"folder": "runs/sft"},
        "mesh": {"tensor": tensor},
    }
    config = load_config("sft", values)
    plan = make_plan("sft", config, name, lambda text: print(text, file=sys.stderr))
    parts = PARTS["sft"](config, make_mesh(tensor=tensor, devices=devices))
    return {
        "topology": name,
        "model": model,
        "tensor": tensor,
        "tflop": plan.costs.flops / 1e12,
        "sent": plan.costs.inner + plan.costs.outer,
        "formula": formula(parts, len(devices), tensor),
        "compile_seconds": plan.compile_seconds,
        "by_kind": {
            kind: traffic.inner + traffic.outer for kind, traffic in plan.costs.collectives.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/results/scaling.jsonl")
    parser.add_argument("topologies", nargs="*", default=TOPOLOGIES)
    parsed = parser.parse_args()
    lines = parsed.out.read_text("utf-8").splitlines() if parsed.out.exists() else []
    known = {(row["topology"], row["model"], row["tensor"]): row for row in map(json.loads, lines)}
    heads = ("topology", "tensor", "TFLOP", "GB sent", "formula", "ratio", "compiled")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    rows = []
    for name in parsed.topologies:
        key = (name, parsed.model, parsed.tensor)
        if key not in known:
            known[key] = compile_row(*key)
            with parsed.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
        row = known[key]
        rows.append(row)
        print(
            f"| {name} | {parsed.tensor} | {row['tflop']:.3f} | {row['sent'] / 1e9:.2f} | "
            f"{row['formula'] / 1e9:.2f} | {row['sent'] / row['formula']:.2f} | "
            f"{row['compile_seconds']:.0f} s |",
            flush=True,
        )
    flops = [row["tflop"] for row in rows]
    assert max(flops) < 1.02 * min(flops), f"FLOPs of a device change: {flops}"
    for row in rows:
        assert 0.9 < row["sent"] / row["formula"] < 1.1, f"{row['topology']}: not as the formula"


if __name__ == "__main__":
    main()
