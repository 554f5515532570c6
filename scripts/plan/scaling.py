"""Weak scaling of an SFT step by its compiled programs: FLOPs and traffic of one device.

    python scripts/plan/scaling.py [--model NAME] [--fsdp 16] [--tensor 1] [v5e-8 v5e-64 …]

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

from jaxalign.parallel.mesh import make_mesh
from jaxalign.plan import find_devices, make_plan, run_shapes
from jaxalign.run.config.runs import load_config

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 2048
TOPOLOGIES = ["v5e-8", "v5e-64", "v5e-256", "v5p-4096"]


def formula(shape, params, mesh, passed):
    """Bytes that a device sends in bfloat16: weights gathered twice and gradients scattered once
    (FSDP), the shards' gradients summed over the replicas (data, those of the vocabulary in
    float32), six sums of activations a layer (tensor, all recomputed).

    In collective matrix products (Wang et al. 2023, doi 10.1145/3567955.3567959) weights are passed
    from neighbour to neighbour while a product is computed, and gathered for each of the three that
    need them: forward, its recomputation and backward. `passed` bytes say how many of the layers'
    weights these are, of which each takes three gathers and a scatter."""
    data, shards, tensor = mesh.devices.shape[:3]
    cut = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1) / tensor
    layers = sum(x.size for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2) / tensor
    apart = passed / (4 * 2) / ((shards - 1) / shards)
    fsdp = (3 * 2 * cut + 2 * min(apart, layers)) * (shards - 1) / shards
    # A tied table has two gradients to sum: as the head's, and as what is looked up.
    summed = 2 * layers + 4 * (cut - layers) * (2 if shape.tie_embeddings else 1)
    replicas = 2 * summed / shards * (data - 1) / data
    sums = 6 * shape.num_layers * 2 * LENGTH * shape.hidden_size
    return fsdp + replicas + 2 * sums * (tensor - 1) / tensor


def compile_row(name, model, fsdp, tensor):
    devices = find_devices(name)
    shards = min(fsdp, len(devices) // tensor) if fsdp else len(devices) // tensor
    sizes = {"data": -1, "fsdp": shards, "tensor": tensor}
    values = {
        "model": {"source": model, "remat": "block"},
        "data": {"train": ["absent.jsonl"], "rows": len(devices) // tensor, "length": LENGTH},
        "run": {"folder": "runs/sft"},
        "mesh": sizes,
    }
    config = load_config("sft", values)
    plan = make_plan("sft", config, name, lambda text: print(text, file=sys.stderr))
    mesh = make_mesh(**sizes, devices=devices)
    by_kind = {k: traffic.inner + traffic.outer for k, traffic in plan.costs.collectives.items()}
    passed = by_kind.get("collective-permute", 0.0)
    state, parts = run_shapes("sft", config, mesh)
    return {
        "topology": name,
        "model": model,
        "fsdp": fsdp,
        "tensor": tensor,
        "tflop": plan.costs.flops / 1e12,
        "sent": plan.costs.inner + plan.costs.outer,
        "formula": formula(parts.policy.config, state.params, mesh, passed),
        "compile_seconds": plan.compile_seconds,
        "by_kind": by_kind,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("--fsdp", type=int, default=16, help="most shards of weights; 0: any")
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs/results/scaling.jsonl")
    parser.add_argument("topologies", nargs="*", default=TOPOLOGIES)
    parsed = parser.parse_args()
    lines = parsed.out.read_text("utf-8").splitlines() if parsed.out.exists() else []
    names = ("topology", "model", "fsdp", "tensor")
    known = {tuple(row[n] for n in names): row for row in map(json.loads, lines)}
    heads = ("topology", "fsdp", "tensor", "TFLOP", "GB sent", "formula", "ratio", "compiled")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    rows = []
    for name in parsed.topologies:
        key = (name, parsed.model, parsed.fsdp, parsed.tensor)
        if key not in known:
            known[key] = compile_row(*key)
            with parsed.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(known[key]) + "\n")
        row = known[key]
        rows.append(row)
        print(
            f"| {name} | {parsed.fsdp} | {parsed.tensor} "
            f"| {row['tflop']:.3f} | {row['sent'] / 1e9:.2f} | "
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
