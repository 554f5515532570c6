"""Memory of PPO with four 7B models on four A100-80G, all of actor and critic trained, as a table.

    python scripts/plan/four_models.py [--topology a100-80g:4] [--only int8] [--json OUT]
    python scripts/plan/four_models.py --topology h100:1 --only adapters --only adapters-8

With adapters, the four lie on one base: of rank 16 on all projections, the base in bfloat16.

1,024 tokens of prompt and as many of answer, Llama-2-7B's shape. Nothing but a compiler is needed
(`pip install "jaxalign[plan-gpu]"`); each line takes minutes on two cores.
"""

import argparse
import dataclasses
import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"

from jaxalign.plan import make_plan
from jaxalign.run.config.runs import load_config

RUN = {
    "model": {"source": "meta-llama/Llama-2-7b-hf", "remat": "block"},
    "reward_model": "runs/reward/model",
    "data": {"train": ["absent.jsonl"], "rows": 32, "length": 1024},
    "run": {"folder": "runs/ppo"},
    "ppo": {"max_new_tokens": 1024},
    "minibatches": 8,
}
ADAPTERS = [
    "model.lora.rank=16",
    "model.dtype=bfloat16",
    "critic=adapter",
    "reward_model=null",
    "rewards=[{kind: model, source: runs/reward/adapter, adapter: true}]",
]
LINES = {
    "float32": ("float32 moments", ["optimizer.moments=float32"]),
    "bfloat16": ("bfloat16 moments", ["optimizer.moments=bfloat16"]),
    "offload": (
        "float32 moments and frozen models in host memory",
        ["optimizer.moments=float32", "optimizer.offload=true", "offload_frozen=true"],
    ),
    "shared": ("8-bit moments, shared trunk", ["optimizer.moments=int8", "ppo.shared_critic=true"]),
    "int8": ("8-bit moments", ["optimizer.moments=int8"]),
    "int8-away": (
        "8-bit moments, frozen models in host memory",
        ["optimizer.moments=int8", "offload_frozen=true"],
    ),
    "int8-bf16": (
        "8-bit moments, all weights bfloat16",
        ["optimizer.moments=int8", "model.dtype=bfloat16"],
    ),
    "adapters": ("adapters on one base in bfloat16", ADAPTERS),
    "adapters-8": (
        "the same, 8 answers at a time, updates in two micro-batches",
        [*ADAPTERS, "ppo.slots=8", "run.micro_batches=2"],
    ),
    "least": (
        "8-bit moments, all weights bfloat16, frozen models in host memory, 16 answers at a time",
        [
            "optimizer.moments=int8",
            "model.dtype=bfloat16",
            "offload_frozen=true",
            "ppo.slots=16",
        ],
    ),
}
KINDS = ("params", "frozen", "optimizer", "models", "batch", "cache", "temporary", "other", "host")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="a100-80g:4")
    parser.add_argument("--only", choices=tuple(LINES), action="append")
    parser.add_argument("--json", metavar="OUT")
    parsed = parser.parse_args()
    plans = {}
    print(f"| GB a device on {parsed.topology} | {' | '.join(KINDS)} | most | all devices | fits |")
    print(f"| --- |{' --- |' * (len(KINDS) + 3)}")
    for name in parsed.only or LINES:
        title, overrides = LINES[name]
        config = load_config("ppo", RUN, overrides)
        plan = make_plan("ppo", config, parsed.topology, lambda text: print(text, file=sys.stderr))
        plans[name] = dataclasses.asdict(plan)
        parts = " | ".join(f"{getattr(plan, kind) / 1e9:.1f}" for kind in KINDS)
        count = plan.devices.split()[0]
        print(
            f"| {title} | {parts} | {plan.total / 1e9:.1f} ({plan.peak}) | "
            f"{plan.total * int(count) / 1e9:.0f} | {'yes' if plan.fits else 'no'} |",
            flush=True,
        )
        if parsed.json:
            with open(parsed.json, "w", encoding="utf-8") as file:
                json.dump(plans, file)


if __name__ == "__main__":
    main()
