"""LoRA and QLoRA against full fine-tuning on the same data and steps, and the memory of loading.

    python scripts/bench/adapters.py train SmolLM2-135M-Instruct.Q4_1.gguf --work FOLDER \\
        --out docs/results/adapters.json
    python scripts/bench/adapters.py memory --out docs/results/adapters.json

`train` runs SFT and DPO on the example data of the package for each of `METHODS`, each run in a
process of its own, one after the other. What a method needs of its own is its learning rate: data,
order, batches, steps and schedule are the same, and of the rates in `RATES` the one with the lowest
held-out loss counts, for full fine-tuning as for adapters. A run that is done is not done again. It
notes, before and after, the held-out loss of SFT, and loss and accuracy of DPO on held-out pairs;
and seconds, and the process's peak memory.

`memory` writes a Llama of 106 million weights in float32 (426 MB), and loads it as NF4 and as int8.
It notes the highest resident memory of the process while it loads, above what it was before (with
all libraries there, and a model of a few kilobytes loaded).

The result is one JSON object; each of the two replaces its own part of it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from _job import machine, peak_mib
from load_checkpoint import reset_peak, resident

EXAMPLES = pathlib.Path(__file__).parents[2] / "jaxalign/commands/quickstart/example_data/en"

LORA = {"rank": 16, "alpha": 32.0}

METHODS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"lora": LORA},
    "qlora": {"lora": LORA, "quantize": "nf4"},
    "qlora-double": {"lora": LORA, "quantize": "nf4-double"},
    "int8": {"lora": LORA, "quantize": "int8"},
}
"""Method → what it changes of `model`. Adapters are of all projections."""

RATES = {
    "sft": {"full": (5e-5, 1e-4, 2e-4, 4e-4), "adapters": (1e-3, 2e-3, 4e-3)},
    "dpo": {"full": (5e-6, 1e-5), "adapters": (1e-4, 2e-4)},
}
"""Adapters take 10 to 50 times the rate of whole weights."""

LOSS = {"sft": "loss/nll", "dpo": "loss/preference"}


def rates_of(stage: str, method: str) -> tuple[float, ...]:
    """The learning rates that a method is tried with."""
    return RATES[stage]["full" if method == "full" else "adapters"]


def settings(
    stage: str, method: str, model: str, work: pathlib.Path, steps: int, rate: float
) -> dict[str, Any]:
    """The configuration of a run, as nested values."""
    values: dict[str, Any] = {
        "model": {"source": model, "chat_template": "chatml", **METHODS[method]},
        "optimizer": {
            "learning_rate": rate,
            "schedule": "linear",
            "warmup_steps": 2,
        },
        "run": {
            "folder": str(work / f"{stage}-{method}-{rate}"),
            "steps": steps,
            "log_every": 5,
            "export": False,
            "checkpoint": False,
            "overwrite": True,
        },
    }
    pairs = [{"path": str(work / name), "columns": {"kind": "ignore"}} for name in PAIRS]
    if stage == "dpo":
        data = {"train": pairs[:1], "eval": pairs[1:], "rows": 3, "length": 176}
        data |= {"packing": True, "shared_prefix": True, "epochs": None}
        return values | {"data": data, "dpo": {"beta": 0.1}}
    answers = {"path": str(EXAMPLES / "preferences.jsonl"), "rows": 100}
    answers["columns"] = {"completion": "chosen", "rejected": "ignore", "kind": "ignore"}
    data = {
        "train": [str(EXAMPLES / "conversations.jsonl"), answers],
        "eval": [str(EXAMPLES / "conversations_heldout.jsonl")],
    }
    return values | {"data": data | {"rows": 6, "length": 128, "packing": True, "epochs": None}}


PAIRS = ("pairs.jsonl", "pairs_heldout.jsonl")


def write_pairs(work: pathlib.Path) -> None:
    """Training pairs, and 100 that are held out: the example data holds out 48 only."""
    texts = [
        (EXAMPLES / f"preferences{part}.jsonl").read_text("utf-8").splitlines()
        for part in ("", "_heldout")
    ]
    apart = 100 - len(texts[1])
    for name, lines in zip(PAIRS, (texts[0][:-apart], texts[0][-apart:] + texts[1]), strict=True):
        (work / name).write_text("\n".join(lines) + "\n", "utf-8")


def child(stage: str, method: str, model: str, work: pathlib.Path, steps: int, rate: float) -> None:
    """One run; leaves its figures in `work`."""
    from jaxalign.run.config.runs import load_config
    from jaxalign.run.loop import train

    start = time.perf_counter()
    result = train(load_config(stage, settings(stage, method, model, work, steps, rate)))
    done = {
        "before": result.before,
        "after": result.after,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": round(peak_mib()),
        "steps": steps,
        "rate": rate,
    }
    (work / f"{stage}-{method}-{rate}.json").write_text(json.dumps(done, indent=1) + "\n")


def run_child(*arguments: str) -> None:
    """This script in a process of its own."""
    subprocess.run([sys.executable, __file__, *arguments], check=True)


def compare(given: argparse.Namespace) -> dict[str, Any]:
    """All runs, and how far adapters are from full fine-tuning."""
    given.work.mkdir(parents=True, exist_ok=True)
    write_pairs(given.work)
    found: dict[str, Any] = {"model": pathlib.Path(given.model).name, "lora": LORA}
    for stage, loss in LOSS.items():
        steps, rows = getattr(given, f"{stage}_steps"), {}
        for method in given.methods:
            tried = []
            for rate in rates_of(stage, method):
                path = given.work / f"{stage}-{method}-{rate}.json"
                if not path.exists():
                    work = str(given.work)
                    run_child("child", stage, method, given.model, work, str(steps), str(rate))
                tried.append(json.loads(path.read_text()))
            best = min(tried, key=lambda row: row["after"][loss])
            all_rates = {str(row["rate"]): row["after"][loss] for row in tried}
            rows[method] = best | {"loss_by_rate": all_rates}
        for row in rows.values():
            if stage == "sft":
                ratio = row["after"][loss] / rows["full"]["after"][loss]
                row["loss_vs_full"] = round(ratio, 4)
            else:
                name = "rewards/accuracies"
                apart = row["after"][name] - rows["full"]["after"][name]
                row["accuracy_vs_full"] = round(apart, 4)
        found[stage] = rows
    return found


# --- memory of loading ---------------------------------------------------------------------------

WIDTH, INNER, LAYERS, VOCAB = 1024, 4096, 6, 4096


def write_model(folder: pathlib.Path) -> None:
    """A Llama of random float32 weights, written down from the format."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB,
        "hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS,
        "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng, tensors = np.random.default_rng(0), {}

    def draw(*shape: int) -> Any:
        return 0.02 * rng.standard_normal(shape, np.float32)

    tensors["model.embed_tokens.weight"] = draw(VOCAB, WIDTH)
    tensors["model.norm.weight"] = np.ones(WIDTH, np.float32)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in "qkvo":
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = draw(WIDTH, WIDTH)
        for name in ("gate", "up"):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = draw(INNER, WIDTH)
        tensors[f"{prefix}mlp.down_proj.weight"] = draw(WIDTH, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(WIDTH, np.float32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: pathlib.Path, kind: str) -> None:
    """Loads in this process; prints what it took."""
    import jax

    import jaxalign as ja
    from jaxalign.models.base import DecoderConfig
    from jaxalign.models.decoder import Decoder

    quantize = None if kind == "float32" else kind
    with tempfile.TemporaryDirectory() as scratch:  # all code is there before memory is looked at
        config = DecoderConfig(
            vocab_size=16, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=8,
            num_kv_heads=8, head_dim=2,
        )  # fmt: skip
        model = Decoder(config)
        ja.save_pretrained(model, model.init(jax.random.key(0)), scratch + "/small")
        ja.load_pretrained(scratch + "/small", quantize=quantize)
    before = resident("VmRSS")
    reset_peak()
    start = time.perf_counter()
    model, params = ja.load_pretrained(folder, quantize=quantize)
    jax.block_until_ready(params)
    seconds, peak = time.perf_counter() - start, resident("VmHWM")
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    matrices = sum(x.nbytes for x in jax.tree.leaves(params["blocks"]) if x.ndim > 2)
    weights = sum(
        x.size for x in jax.tree.leaves(Decoder(model.config).shapes["blocks"]) if x.ndim > 2
    )
    row = {
        "file_mb": round((folder / "model.safetensors").stat().st_size / 1e6, 1),
        "params_mb": round(size / 1e6, 1),
        "bytes_a_weight": round(matrices / weights, 4),
        "peak_above_start_mb": round((peak - before) / 1e6, 1),
        "peak_above_params_mb": round((peak - before - size) / 1e6, 1),
        "seconds": round(seconds, 1),
    }
    print(json.dumps(row))


def measure_memory() -> dict[str, Any]:
    """Rows of `load`, each in a process of its own."""
    rows = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "model"
        write_model(folder)
        for kind in ("float32", "nf4", "nf4-double", "int8"):
            command = [sys.executable, __file__, "load", str(folder), kind]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            rows[kind] = json.loads(done.stdout.splitlines()[-1])
            print(kind, rows[kind], flush=True)
    return rows


def main() -> None:
    """See the top."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    runs = parts.add_parser("train")
    runs.add_argument("model", help="GGUF file, folder or hub id")
    runs.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    runs.add_argument("--methods", nargs="+", default=["full", "lora", "qlora"], choices=METHODS)
    runs.add_argument("--sft-steps", type=int, default=30)
    runs.add_argument("--dpo-steps", type=int, default=16)
    memory = parts.add_parser("memory")
    for part in (runs, memory):
        part.add_argument("--out", type=pathlib.Path, help="JSON file whose part is replaced")
    one = parts.add_parser("child")
    for name in ("stage", "method", "model", "work", "steps", "rate"):
        one.add_argument(name)
    one = parts.add_parser("load")
    for name in ("folder", "kind"):
        one.add_argument(name)
    given = parser.parse_args()
    if given.part == "child":
        work, steps, rate = pathlib.Path(given.work), int(given.steps), float(given.rate)
        child(given.stage, given.method, given.model, work, steps, rate)
        return
    if given.part == "load":
        load(pathlib.Path(given.folder), given.kind)
        return
    if given.part == "train" and "full" not in given.methods:
        parser.error("--methods: wanted full among them, which the others are compared with")
    result = compare(given) if given.part == "train" else measure_memory()
    from importlib.metadata import version

    from jaxalign.run.record import versions

    result |= machine() | {"versions": versions() | {"qwix": version("qwix")}}
    print(json.dumps(result, indent=1))
    if given.out is not None:
        whole = json.loads(given.out.read_text()) if given.out.exists() else {}
        given.out.write_text(json.dumps(whole | {given.part: result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
