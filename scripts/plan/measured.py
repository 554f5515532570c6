"""Plan against run: memory and FLOPs of an SFT step of 110M parameters on 8 fake CPU devices.

    python scripts/plan/measured.py [--rows 8] [--length 512] [--json OUT]

Compared are what `jaxalign plan` says, what the compiled step of the run itself reports, by how
much the process grows at its peak while it trains, and the FLOPs by hand (docs/plan.md).
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import re
import tempfile
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

from jaxalign.algorithms.state import init_state
from jaxalign.parallel.mesh import make_mesh
from jaxalign.plan import make_plan, run_shapes
from jaxalign.run.config.runs import load_config
from jaxalign.run.tasks.parts import scheduled_optimizer
from jaxalign.types import TokenBatch

DEVICES = 8
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}


def flops_by_hand(config, remat, tokens, length):
    """As docs/plan.md has it."""
    width, layers = config.hidden_size, config.num_layers
    heads = config.num_heads * config.head_dim
    shared = config.num_kv_heads * config.head_dim
    matrices = layers * width * (2 * heads + 2 * shared + 3 * config.intermediate_size)
    block = max(128, -(-length // 1024) * 128)
    seen = (length + block) / 2 if length >= 256 else length
    product = 2 * layers * heads * seen  # queries by keys, of one token
    each = 3 * 2 * matrices + 7 * product
    if remat == "block":  # once more forward, but for the product that ends a block
        each += 2 * (matrices - layers * width * config.intermediate_size) + 2 * product
    return tokens * (each + 3 * 2 * width * config.vocab_size)


def resident(key="VmRSS"):
    """Bytes of this process in memory now; VmHWM: at most since `forget_peak`."""
    return 1024 * int(
        re.search(rf"{key}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
    )


def forget_peak():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def make_batch(rows, length, vocabulary):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocabulary, (rows, length + 1)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    ones = np.ones((rows, length), np.int32)
    return TokenBatch(ids[:, :-1], ids[:, 1:], positions, ones, ones.astype(bool))


def make_state(shapes, tx):
    def draw():
        leaves, tree = jax.tree.flatten(shapes)
        keys = jax.random.split(jax.random.key(0), len(leaves))
        made = [
            0.02 * jax.random.normal(key, x.shape, x.dtype)
            for key, x in zip(keys, leaves, strict=True)
        ]
        return tree.unflatten(made)

    layout = jax.tree.map(lambda x: x.sharding, shapes)
    return init_state(jax.jit(draw, out_shardings=layout)(), tx)


def account_bytes(account):
    return (
        account.argument_size_in_bytes + account.temp_size_in_bytes
        + account.output_size_in_bytes - account.alias_size_in_bytes
    )  # fmt: skip


def measure(remat, rows, length, folder):
    values = {
        "model": {"source": folder, "remat": remat},
        "data": {"train": ["absent.jsonl"], "rows": rows, "length": length},
        "run": {"folder": "runs/absent"},
    }
    config = load_config("sft", values)
    plan = make_plan("sft", config, f"cpu:{DEVICES}")
    mesh = make_mesh()
    shapes, parts = run_shapes("sft", config, mesh)
    model, params, step = parts.policy, shapes.params, parts.step
    tx = scheduled_optimizer(config.optimizer, 1)
    state, batch = make_state(params, tx), make_batch(rows, length, SHAPE["vocab_size"])
    account = step.lower(state, batch).compile().memory_analysis()
    state, metrics = step(state, batch)  # compiled and warm
    jax.block_until_ready(state)
    del state
    forget_peak()
    before = resident()
    state = make_state(params, tx)
    forget_peak()
    began = time.perf_counter()
    state, metrics = step(state, batch)
    loss = float(metrics["loss"])
    jax.block_until_ready(state)
    seconds = time.perf_counter() - began
    grown = resident("VmHWM") - before
    return {
        "remat": remat,
        "parameters": sum(x.size for x in jax.tree.leaves(params)),
        "planned": plan.total,
        "reported": account_bytes(account),
        "grown": grown / DEVICES,
        "planned_flops": plan.costs.flops * DEVICES,
        "flops_by_hand": flops_by_hand(model.config, remat, rows * length, length),
        "loss": loss,
        "seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=DEVICES)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--json", metavar="OUT")
    parsed = parser.parse_args()
    found = []
    heads = ("remat", "MB a device: plan", "step reports", "grown", "TFLOP: plan", "by hand")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    with tempfile.TemporaryDirectory() as folder:
        pathlib.Path(folder, "config.json").write_text(json.dumps(SHAPE))
        for remat in ("none", "block"):
            one = measure(remat, parsed.rows, parsed.length, folder)
            found.append(one)
            sizes = [one["planned"], one["reported"], one["grown"]]
            counts = [one["planned_flops"], one["flops_by_hand"]]
            told = [f"{size / 1e6:.1f} ({size / sizes[0] - 1:+.1%})" for size in sizes]
            told += [f"{count / 1e12:.3f} ({count / counts[0] - 1:+.1%})" for count in counts]
            print(f"| {remat} | {' | '.join(told)} |", flush=True)
    if parsed.json:
        pathlib.Path(parsed.json).write_text(json.dumps(found))
    for one in found:
        assert abs(one["reported"] / one["planned"] - 1) < 0.10, "memory as the step reports it"
        assert abs(one["grown"] / one["planned"] - 1) < 0.25, "growth of the process"
        assert abs(one["flops_by_hand"] / one["planned_flops"] - 1) < 0.02, "FLOPs"


if __name__ == "__main__":
    main()
