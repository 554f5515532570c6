"""Compiles train steps for devices that are not there, and says what a device would hold.

    python scripts/compile_ahead.py --devices v5e:4x4 h100:8 --algorithms sft dpo ppo
    python scripts/compile_ahead.py --devices v5e:4x4 --slices 2 --mesh data=2

One JSON line a step: the form of attention, the kernels in the compiled program, bytes a device.
TPUs need `pip install "jaxalign[plan-tpu]"`, GPUs `"jaxalign[plan-gpu]"`; no TPU, GPU or driver is
needed. Start it with JAX_PLATFORMS=cpu.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from jaxalign.algorithms import dpo, ppo, sft
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import opt_state_shardings
from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, replicated
from jaxalign.types import PairBatch, RolloutBatch, TokenBatch, TrainState

LLAMA_1B = DecoderConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
    num_kv_heads=8, head_dim=64, tie_embeddings=True,
)  # fmt: skip

# From the data sheet of the H100 SXM5 and the CUDA programming guide for 9.0.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 2 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def find_devices(name: str, slices: int):
    kind, _, size = name.partition(":")
    if kind == "h100":
        return topologies.get_topology_desc(
            platform="cuda", topology=f"{slices}x1x{size}", target_config=H100
        ).devices
    return topologies.get_topology_desc(
        platform="tpu", topology_name=name, num_slices=slices
    ).devices


def abstract(shapes, shardings):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def tokens_of(rows: int, length: int) -> TokenBatch:
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    return TokenBatch(ids, ids, ids, ids, jax.ShapeDtypeStruct((rows, length), jnp.bool_))


def make_case(algorithm: str, model: Decoder, rows: int, length: int):
    """(models' axes, their shapes, optimizer, step, batch)."""
    tx = make_optimizer(OptimizerConfig(learning_rate=1e-5, schedule="constant"))
    tokens = tokens_of(rows, length)
    if algorithm == "sft":
        return model.axes, model.shapes, tx, sft.make_step(model, tx), tokens
    if algorithm == "dpo":
        logps = jax.ShapeDtypeStruct((rows,), jnp.float32)
        return model.axes, model.shapes, tx, dpo.make_step(model, tx), PairBatch(
            tokens, tokens, logps, logps
        )  # fmt: skip
    critic = Scorer(model)
    tx = ppo.make_optimizer(tx, tx)
    each = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    step = ppo.make_step(model, critic, tx, ppo.Config())
    axes, shapes = (
        ppo.init_params(*parts)
        for parts in ((model.axes, critic.axes), (model.shapes, critic.shapes))
    )
    return axes, shapes, tx, step, RolloutBatch(tokens, *(each,) * 5)


def compile_one(algorithm: str, devices: str, slices: int, model: Decoder, sizes: dict[str, int],
                rows: int, length: int) -> dict:  # fmt: skip
    mesh = make_mesh(devices=find_devices(devices, slices), **sizes)
    axes, shapes, tx, step, batch = make_case(algorithm, model, rows, length)
    params = abstract(shapes, param_shardings(axes, mesh, shapes))
    opt_state = abstract(jax.eval_shape(tx.init, params), opt_state_shardings(params, tx))
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated(mesh))
    state = TrainState(count, params, {}, opt_state)
    with jax.set_mesh(mesh):
        choice = model.attention_kind(length)
    start = time.perf_counter()
    compiled = compile_step(step, state, mesh).lower(state, batch).compile()
    seconds = time.perf_counter() - start
    text, account = compiled.as_text(), compiled.memory_analysis()
    kernels = set(re.findall(r'custom_call_target="(__cudnn[^"]+)"', text))
    kernels |= set(re.findall(r"splash_\w+|flash_(?:forward|to_queries|to_keys)", text))
    total = (
        account.argument_size_in_bytes + account.temp_size_in_bytes
        + account.output_size_in_bytes - account.alias_size_in_bytes
    )  # fmt: skip
    return {
        "algorithm": algorithm, "devices": devices, "slices": slices, "mesh": dict(mesh.shape),
        "rows": rows, "length": length, "attention": str(choice), "kernels": sorted(kernels),
        "state_gib": round(account.argument_size_in_bytes / 2**30, 2),
        "temporary_gib": round(account.temp_size_in_bytes / 2**30, 2),
        "total_gib": round(total / 2**30, 2), "compile_seconds": round(seconds, 1),
        "jax": jax.__version__,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", nargs="+", default=["v5e:4x4", "h100:8"])
    parser.add_argument("--slices", type=int, default=1, help="of so many devices (nodes, of GPUs)")
    parser.add_argument("--algorithms", nargs="+", default=["sft", "dpo", "ppo"])
    parser.add_argument("--rows", type=int, help="in all; 16 a slice unless given")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=LLAMA_1B.num_layers)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--mesh", nargs="*", default=[], help="sizes such as tensor=2 sequence=2")
    given = parser.parse_args()
    sizes = {name: int(size) for name, _, size in (one.partition("=") for one in given.mesh)}
    config = dataclasses.replace(LLAMA_1B, num_layers=given.layers)
    model = Decoder(config, compute_dtype="bfloat16", remat="block", attention=given.attention)
    rows = given.rows or 16 * given.slices
    for devices in given.devices:
        for algorithm in given.algorithms:
            line = compile_one(algorithm, devices, given.slices, model, sizes, rows, given.length)
            print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
