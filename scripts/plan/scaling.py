"""Weak scaling of an SFT step by its compiled programs: FLOPs and traffic of one device.

    python scripts/plan/scaling.py [--model meta-llama/Llama-3.2-1B] [v5e-8 v5e-16 …]

A row of 2,048 tokens a device, fully sharded. FLOPs should not change; what is sent should be that
of the formula in docs/plan.md, 2 n (s − 1)/s bytes for each gathering of n bfloat16 weights over s
shards and 4 n (s − 1)/s for scattering their float32 gradients.
"""

import argparse
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from jaxalign.config import load_config
from jaxalign.plan import find_devices, make_plan
from jaxalign.plan.parts import PARTS
from jaxalign.sharding import make_mesh


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="meta-llama/Llama-3.2-1B")
    parser.add_argument("topologies", nargs="*", default=["v5e-8", "v5e-64", "v5e-256"])
    parsed = parser.parse_args()
    print("| topology | TFLOP | GB sent | formula | ratio | compiled |\n| --- |" + " --- |" * 5)
    for name in parsed.topologies:
        devices = find_devices(name)
        values = {
            "model": {"source": parsed.model, "remat": "block"},
            "data": {"train": ["absent.jsonl"], "rows": len(devices), "length": 2048},
            "run": {"folder": "runs/sft"},
        }
        config = load_config("sft", values)
        plan = make_plan("sft", config, name, lambda text: print(text, file=sys.stderr))
        mesh = make_mesh(devices=devices)
        params = PARTS["sft"](config, mesh).params
        cut = sum(x.size for x in jax.tree.leaves(params) if x.ndim > 1)
        share = (len(devices) - 1) / len(devices)
        formula = (2 * 2 + 4) * cut * share
        sent = plan.costs.inner + plan.costs.outer
        print(
            f"| {name} | {plan.costs.flops / 1e12:.3f} | {sent / 1e9:.2f} | {formula / 1e9:.2f} | "
            f"{sent / formula:.2f} | {plan.compile_seconds:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
