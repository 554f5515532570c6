"""Time and memory of loading and exporting a large checkpoint, against copying its files.

    python scripts/bench/load_checkpoint.py [--repeats 3] [--scale 1] [--out FILE.jsonl]

Makes a Llama of 3.2 billion parameters in bfloat16 (random weights in several safetensors files,
6.4 GB, in a temporary folder that is removed in the end; `--scale 0.1` is for trying it out). Each
repeat copies the files with `cp`, and in a fresh process with 8 fake CPU devices loads them onto an
fsdp=8 mesh and exports them again. Files that are read are in the page cache each time. A virtual
machine may hand free memory back to its host, and a page that must come from there costs more than
to copy it: times vary by a factor of three with what the kernel has at hand. So memory is touched
before `cp`, and before exporting the source leaves the page cache to what is written.

Prints, and with `--out` appends, one JSON object:

- `peak_gb`: highest resident memory of the process while it loads or exports; `bound_gb`: what it
  may be, 1.3 × the largest tensor + the shards of all devices + `base_gb`, which is the interpreter
  with its libraries, measured after a model of a few kilobytes has been loaded and saved.
- `cp_s`, `load_s`, `export_s`: medians; `cp_synced_s`, `export_synced_s`: until the disk has all of
  it. A kernel lets a process run ahead of the disk by a share of the memory that is free, which is
  more for `cp` than for a process that holds a model, and depends on what ran before: the times
  without it vary by a factor of two.
- `load_vs_cp` (`cp_s`, since a load writes nothing), `export_vs_cp` (both synced): time of `cp`
  over time of this. `cp` reads and writes, so the like of it is the round trip.
- `equal`: whether every exported tensor equals its source bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

GB = 1e9
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def main() -> None:
    """Runs the benchmark; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of the parameters, roughly")
    parser.add_argument("--out", help="JSONL file to append the result to")
    parser.add_argument("--folder", help="where the temporary folder goes")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(*map(pathlib.Path, given.child))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        result = measure(pathlib.Path(scratch), given.repeats, given.scale)
    line = json.dumps(result)
    print(line)
    if given.out:
        with open(given.out, "a", encoding="utf-8") as file:
            file.write(line + "\n")


def measure(scratch: pathlib.Path, repeats: int, scale: float) -> dict[str, object]:
    """Makes the checkpoint, copies, loads and exports it."""
    source, copy, out = scratch / "source", scratch / "copy", scratch / "out"
    total, largest = generate(source, scale)
    rows = []
    for _ in range(repeats):
        copy.mkdir()
        touch_memory()
        warm(source)
        os.sync()  # nobody is to pay for what others left to be written to the disk
        start = time.perf_counter()
        subprocess.run(["cp", "-r", f"{source}/.", str(copy)], check=True)
        row = {"cp_s": time.perf_counter() - start}
        os.sync()
        row["cp_synced_s"] = time.perf_counter() - start
        shutil.rmtree(copy)
        shutil.rmtree(out, ignore_errors=True)
        warm(source)
        done = subprocess.run(
            [sys.executable, __file__, "--child", str(source), str(out)],
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(done.stderr)
        row |= json.loads(done.stdout.splitlines()[-1])
        row["round_trip_s"] = row["load_s"] + row["export_synced_s"]
        print(row, file=sys.stderr)
        rows.append(row)
    median = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    peak = max(max(row["load_peak"], row["export_peak"]) for row in rows)
    bound = 1.3 * largest + total + median["base"]
    return {
        "parameters": total // 2,
        "bytes": total,
        "largest_tensor_gb": round(largest / GB, 3),
        "base_gb": round(median["base"] / GB, 3),
        "load_peak_gb": round(max(row["load_peak"] for row in rows) / GB, 3),
        "peak_gb": round(peak / GB, 3),
        "bound_gb": round(bound / GB, 3),
        "within_bound": peak <= bound,
        "cp_s": round(median["cp_s"], 2),
        "load_s": round(median["load_s"], 2),
        "export_s": round(median["export_s"], 2),
        "cp_synced_s": round(median["cp_synced_s"], 2),
        "export_synced_s": round(median["export_synced_s"], 2),
        "load_vs_cp": round(median["cp_s"] / median["load_s"], 2),
        "export_vs_cp": round(median["cp_synced_s"] / median["export_synced_s"], 2),
        "round_trip_vs_cp": round(median["cp_synced_s"] / median["round_trip_s"], 2),
        "repeats": repeats,
        "cores": os.cpu_count(),
        "equal": equal(source, out),
    }


def touch_memory() -> None:
    """Writes to every free page once, in a process of its own, which gives them back."""
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    code = f"import numpy; numpy.ones({int(0.9 * pages)}, numpy.uint8)"
    subprocess.run([sys.executable, "-c", code], check=True)


def forget(folder: pathlib.Path) -> None:
    """Takes files that were read out of the page cache, to leave memory for what is written."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """HF tensor name → shape, written down from the format, not taken from the package."""
    width, inner, heads, kv, head = (
        int(str(config[key]))
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    found = {"model.embed_tokens.weight": (int(str(config["vocab_size"])), width)}
    for layer in range(int(str(config["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}."
        found |= {
            prefix + "self_attn.q_proj.weight": (heads * head, width),
            prefix + "self_attn.k_proj.weight": (kv * head, width),
            prefix + "self_attn.v_proj.weight": (kv * head, width),
            prefix + "self_attn.o_proj.weight": (width, heads * head),
            prefix + "mlp.gate_proj.weight": (inner, width),
            prefix + "mlp.up_proj.weight": (inner, width),
            prefix + "mlp.down_proj.weight": (width, inner),
            prefix + "input_layernorm.weight": (width,),
            prefix + "post_attention_layernorm.weight": (width,),
        }
    return found | {"model.norm.weight": (width,)}


def generate(folder: pathlib.Path, scale: float, max_bytes: int = 2_000_000_000) -> tuple[int, int]:
    """Writes the checkpoint; gives the bytes of all tensors and of the largest one."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    config = CONFIG | {
        "num_hidden_layers": max(1, round(28 * scale)),
        "vocab_size": max(8, round(128256 * scale) // 8 * 8),
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    files: list[list[str]] = [[]]
    wanted, size = shapes(config), 0
    for name, shape in wanted.items():
        if files[-1] and size + 2 * math.prod(shape) > max_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += 2 * math.prod(shape)
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {}
        for name in names:
            bits = np.frombuffer(rng.bytes(2 * math.prod(wanted[name])), np.uint16)
            # Without the highest bit of the exponent: any finite number below 2 in size.
            tensors[name] = (bits & 0xBFFF).view(ml_dtypes.bfloat16).reshape(wanted[name])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(2 * math.prod(shape) for shape in wanted.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    os.sync()  # so that writing it does not go on behind the measurements
    return total, max(2 * math.prod(shape) for shape in wanted.values())


def warm(folder: pathlib.Path) -> None:
    """Reads the files once, and lets earlier writes finish."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def resident(field: str) -> int:
    """A memory figure of this process in bytes: VmRSS now, VmHWM at its highest."""
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: this needs Linux")


def reset_peak() -> None:
    """Sets VmHWM back to what is resident now."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def child(source: pathlib.Path, out: pathlib.Path) -> None:
    """Loads and exports in this process; prints times and memory."""
    import jax

    import jaxalign as ja

    mesh = ja.make_mesh(data=1, fsdp=8, tensor=1)
    with tempfile.TemporaryDirectory() as scratch:
        # A model without any size, so that all code is there before memory is looked at.
        small = pathlib.Path(scratch) / "small"
        from jaxalign.models.base import DecoderConfig
        from jaxalign.models.decoder import Decoder

        config = DecoderConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=8,
            num_kv_heads=8, head_dim=2,
        )  # fmt: skip
        decoder = Decoder(config)
        zeros = jax.tree.map(lambda x: jax.numpy.zeros(x.shape, "bfloat16"), decoder.shapes)
        ja.save_pretrained(decoder, zeros, small)
        ja.save_pretrained(*ja.load_pretrained(small, mesh=mesh, dtype="bfloat16"), small)
        del zeros
    result: dict[str, float] = {"base": resident("VmRSS")}
    reset_peak()
    start = time.perf_counter()
    model, params = ja.load_pretrained(source, mesh=mesh, dtype="bfloat16")
    jax.block_until_ready(params)
    result |= {"load_s": time.perf_counter() - start, "load_peak": resident("VmHWM")}
    forget(source)
    reset_peak()
    start = time.perf_counter()
    ja.save_pretrained(model, params, out)
    result |= {"export_s": time.perf_counter() - start, "export_peak": resident("VmHWM")}
    os.sync()
    result["export_synced_s"] = time.perf_counter() - start
    print(json.dumps(result))


def equal(source: pathlib.Path, out: pathlib.Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit, as the safetensors library reads."""
    import contextlib

    import safetensors

    with contextlib.ExitStack() as stack:
        handles = [
            {
                name: handle
                for path in sorted(folder.glob("*.safetensors"))
                for handle in [stack.enter_context(safetensors.safe_open(path, framework="numpy"))]
                for name in handle.keys()  # noqa: SIM118 (not a dict)
            }
            for folder in (source, out)
        ]
        return handles[0].keys() == handles[1].keys() and all(
            a.get_tensor(name).tobytes() == handles[1][name].get_tensor(name).tobytes()
            for name, a in handles[0].items()
        )


if __name__ == "__main__":
    main()
