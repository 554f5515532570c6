"""How cost grows with the work on a CPU, and how long a run takes to its first step.

    python scripts/bench/growth.py --work FOLDER --out docs/results/growth.jsonl
    python scripts/bench/growth.py --work FOLDER --what start    # or rows, memory, sizes, …

rows: time a token of SFT (size S, rows of 256) from 2 to 64 rows a step, of which at most four are
computed at a time; it should be flat. All sizes take turns, are measured over as many rows in all,
and give the medians of all turns. memory: peak of the process over rows of 1k to 32k tokens (a
small model, one row, no recomputation); it should grow with the tokens, not with their square.
sizes: seconds of a step of 2 × 128 tokens of adapters on models of 7 million to a billion
parameters. lengths: seconds of a row of 1k to 64k tokens (XS). devices: seconds of a step of S on 1
to 8 simulated devices, which share the same two cores. For these three, `exponents` are d
log(seconds) / d log(x) between neighbours, and `expected` those of the model FLOPs
(`jaxalign.models.flops`), or 0. start: seconds from the command `jaxalign sft` (size S, 8 × 256
tokens) to the end of its first step, without and with the compiled programs of an earlier run.
Every figure is of a fresh process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from _job import append, machine

import jaxalign as ja
from jaxalign.commands.bench import Case, run_cases
from jaxalign.commands.bench.sizes import SIZES
from jaxalign.models.flops import row_flops

ROWS = (2, 4, 8, 16, 32, 64)
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
MODELS = ("S", "M", "Qwen3-0.6B", "1B")
DEVICES = (1, 2, 4, 8)


def rows(arguments: argparse.Namespace) -> dict[str, Any]:
    """Microseconds a token by rows of a step, and the largest over the smallest."""
    counts = [n for n in ROWS if n <= arguments.most_rows]
    most = max(counts)
    cases = [
        Case(what="sft", size=arguments.size, rows=n, repeats=max(2, most // n), seconds=60.0)
        for n in counts
    ]
    seconds: dict[int, list[float]] = {n: [] for n in counts}
    for _ in range(arguments.repeats):
        for case, record in zip(cases, done(run_cases(cases)), strict=True):
            seconds[case.rows] += record["all_seconds"]
    tokens = {case.rows: case.rows * case.length for case in cases}
    cost = {n: 1e6 * statistics.median(each) / tokens[n] for n, each in seconds.items()}
    return {"microseconds_a_token": cost, "spread": max(cost.values()) / min(cost.values())}


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes that each further token takes, between every two lengths."""
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # one row is one device's
    lengths = [n for n in LENGTHS if n <= arguments.longest]
    cases = [
        Case(what="sft", size="XS", rows=1, length=n, micro_batches=1, repeats=1) for n in lengths
    ]
    records = done(run_cases(cases))
    peak = {n: r["peak_bytes"] for n, r in zip(lengths, records, strict=True)}
    slope = {f"{a} to {b}": (peak[b] - peak[a]) / (b - a) for a, b in itertools.pairwise(lengths)}
    seconds = {n: r["step_seconds"] for n, r in zip(lengths, records, strict=True)}
    return {"peak_bytes": peak, "bytes_a_token": slope, "step_seconds": seconds}


def sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by model."""
    names = MODELS[: 1 + MODELS.index(arguments.largest)]
    cases = [
        Case(
            what="sft",
            size=name,
            rows=2,
            length=128,
            micro_batches=1,
            repeats=2,
            lora=8,
        )
        for name in names
    ]
    records = done(run_cases(cases))
    flops = [row_flops(SIZES[name], 2, 128, head=True) for name in names]
    seconds = [record["step_seconds"] for record in records]
    return {
        "step_seconds": dict(zip(names, seconds, strict=True)),
        "exponents": slopes(flops, seconds),
        "expected": [1.0] * (len(names) - 1),
        "fraction_of_limit": {
            name: record["fraction_of_limit"] for name, record in zip(names, records, strict=True)
        },
    }


def lengths(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a row by its length."""
    os.environ["JAX_NUM_CPU_DEVICES"] = "1"  # one row is one device's
    tokens = [n for n in (*LENGTHS, 65536) if n <= arguments.longest]
    cases = [
        Case(what="sft", size="XS", rows=1, length=n, micro_batches=1, repeats=1) for n in tokens
    ]
    seconds = [record["step_seconds"] for record in done(run_cases(cases))]
    flops = [row_flops(SIZES["XS"], 1, n, head=True) for n in tokens]
    return {
        "step_seconds": dict(zip(tokens, seconds, strict=True)),
        "exponents": slopes(tokens, seconds),
        "expected": slopes(tokens, flops),
    }


def devices(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by the number of simulated devices."""
    seconds = []
    for count in DEVICES:
        os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
        case = Case(what="sft", size=arguments.size, rows=8, repeats=5)
        seconds += [record["step_seconds"] for record in done(run_cases([case]))]
    return {
        "step_seconds": dict(zip(DEVICES, seconds, strict=True)),
        "exponents": slopes(DEVICES, seconds),
        "expected": [0.0] * (len(DEVICES) - 1),
    }


def slopes(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """d log y / d log x between neighbours."""
    pairs = itertools.pairwise(zip(x, y, strict=True))
    return [round(math.log(d / b) / math.log(c / a), 3) for (a, b), (c, d) in pairs]


def done(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, if all cases ran."""
    for record in records:
        if "error" in record:
            raise SystemExit(f"{record['case']}: {record['error']}")
    return records


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first step, cold and warm."""
    folder = arguments.work.absolute() / "start"
    config = make_run(folder, arguments.size)
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(arguments.repeats):
        shutil.rmtree(folder / "programs", ignore_errors=True)
        for kind in found:
            found[kind].append(first_step(folder, config))
    return {kind: {"median": statistics.median(v), "all": v} for kind, v in found.items()}


def first_step(folder: pathlib.Path, config: pathlib.Path) -> float:
    """Runs the command; gives the seconds until its first line of metrics."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    metrics = folder / "run" / "metrics.jsonl"
    env = os.environ | {"JAXALIGN_CACHE": str(folder / "programs")}
    root = str(pathlib.Path(__file__).resolve().parents[2])
    env["PYTHONPATH"] = os.pathsep.join(x for x in (root, env.get("PYTHONPATH")) if x)
    began = time.perf_counter()
    command = [sys.executable, "-m", "jaxalign", "sft", str(config)]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.01)
        seconds = time.perf_counter() - began
        if process.wait():
            raise SystemExit((folder / "log.txt").read_text())
    return round(seconds, 2)


def make_run(folder: pathlib.Path, size: str) -> pathlib.Path:
    """A random Llama with a tokenizer of bytes, texts that fill their rows, and a configuration."""
    import jax
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers

    path = folder / "config.yaml"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    special = ("<pad>", "<end>")
    vocab = {token: i for i, token in enumerate(special)}
    vocab |= {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), len(vocab))}
    core = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([tokenizers.AddedToken(t, special=True) for t in special])
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>"
    )
    model = ja.Decoder(SIZES[size])
    ja.save_pretrained(model, model.init(jax.random.key(0)), folder / "model", tokenizer=tok)
    texts = [{"prompt": f"{number:04d} ", "completion": "word " * 60} for number in range(64)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    path.write_text(
        f"model: {{source: {folder / 'model'}, chat_template: none}}\n"
        f"data: {{train: [{folder / 'data.jsonl'}], rows: 8, length: 256}}\n"
        f"run: {{folder: {folder / 'run'}, steps: 2, export: false, checkpoint: false}}\n"
    )
    return path


MEASURES = {
    "rows": rows,
    "memory": memory,
    "sizes": sizes,
    "lengths": lengths,
    "devices": devices,
    "start": start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--what", nargs="+", default=list(MEASURES), choices=MEASURES)
    parser.add_argument("--size", default="S", help="of rows and start")
    parser.add_argument("--most-rows", type=int, default=ROWS[-1])
    parser.add_argument("--longest", type=int, default=65536, help="of memory (to 32k) and lengths")
    parser.add_argument("--largest", default=MODELS[-1], choices=MODELS, help="model of sizes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    for what in arguments.what:
        row = {"benchmark": "growth", "what": what, **MEASURES[what](arguments), **machine()}
        print(json.dumps(row))
        if arguments.out is not None:
            append(arguments.out, row)


if __name__ == "__main__":
    main()
