"""One NVIDIA GPU in one call: are the numbers right, and how fast are the steps?

    python scripts/bench/gpu.py --out docs/results/gpu.json          # about 9 minutes, one GPU
    python scripts/bench/gpu.py --tiny --out /tmp/tiny.json          # tries the script on a CPU

First every step (SFT, reward, DPO, PPO, generation) is compared with a CPU's numbers
(`_gpu_checks.py`). Then come the measurements, most wanted first: SFT and DPO of the 1B and 3B
Llama shapes in bfloat16 (weights and moments too) on rows of 2k and 8k tokens, an iteration of PPO
(0.5B), generation at batch 64, and beside them TRL where it is installed, else transformers in a
plain loop (`_gpu_peer.py`, in the interpreter `--peer`). Each part is a process of its own with a
deadline: one that fails, runs out of memory (it is tried again with less) or has no time left is
noted in the JSON and the rest goes on. Needs jax, flax, optax and this repository; for the peer
torch and transformers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from jaxalign.commands.bench.case import Case  # noqa: E402
from jaxalign.commands.bench.sizes import SIZES  # noqa: E402

LEAST = 20.0
"""Seconds below which no further part is started."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Something to run.

    Attributes:
      name: in the results.
      commands: tried in turn until one succeeds: (what is told of it, program).
      seconds: the most it may take.
    """

    name: str
    commands: tuple[tuple[dict[str, Any], list[str]], ...]
    seconds: float


def ours(name: str, seconds: float, *choices: dict[str, Any]) -> Part:
    """A case of `jaxalign bench`, with what to try where it does not fit."""
    commands = []
    for choice in choices:
        case = Case(**choice)
        asked = json.dumps(dataclasses.asdict(case) | {"seconds": 8.0})
        commands.append((choice, [sys.executable, "-m", "jaxalign.commands.bench", asked]))
    return Part(name=name, commands=tuple(commands), seconds=seconds)


def theirs(name: str, peer: str, seconds: float, *choices: dict[str, Any]) -> Part:
    """The peer at the same."""
    commands = []
    for choice in choices:
        job = {"dtype": "bfloat16", "checkpointing": False, "repeats": 3, "new_tokens": 0} | choice
        job["shape"] = dataclasses.asdict(SIZES[choice["size"]])
        commands.append((choice, [peer, str(HERE / "_gpu_peer.py"), json.dumps(job)]))
    return Part(name=name, commands=tuple(commands), seconds=seconds)


def plan(arguments: argparse.Namespace) -> list[Part]:
    """All parts, most wanted first."""
    if arguments.tiny:
        small, big, short, long, dtype = "XS", "XS", 32, 64, "float32"
        rows, batch, prompt, new, ppo_rows = 2, 2, 16, 8, 4
    else:
        small, big, short, long, dtype = "1B", "3B", 2048, 8192, "bfloat16"
        rows, batch, prompt, new, ppo_rows = 16384, 64, 128, 256, 64
    common = {"dtype": dtype, "param_dtype": dtype, "repeats": 3}

    def count(length: int, tokens: int = rows) -> int:
        return tokens if arguments.tiny else max(1, tokens // length)

    def train(what: str, size: str, length: int) -> Part:
        tokens = rows if what == "sft" or arguments.tiny else rows // 2
        base = common | {"what": what, "size": size, "length": length}
        # What the 3B shape keeps of 16k tokens is more than an 80 GB card has left.
        keep = ("none", "dots") if size == small and not arguments.tiny else ("dots",)
        tries = [base | {"rows": count(length, tokens), "remat": remat} for remat in keep]
        tries.append(base | {"rows": 1, "remat": "block"})
        return ours(f"{what} {size} {length}", 110, *tries)

    def peer(what: str, size: str, length: int) -> Part:
        tokens = rows if what == "sft" or arguments.tiny else rows // 2
        base = {"what": what, "size": size, "length": length, "dtype": dtype}
        tries = [
            base | {"rows": count(length, tokens)},
            base | {"rows": 1},
            base | {"rows": count(length, tokens), "checkpointing": True},
        ]
        return theirs(f"peer {what} {size} {length}", arguments.peer, 75, *tries)

    writing = {"what": "generate", "rows": batch, "length": prompt, "new_tokens": new}
    iteration = {
        "what": "ppo", "size": "XS" if arguments.tiny else "0.5B", "rows": ppo_rows,
        "length": prompt, "new_tokens": new, "dtype": dtype, "repeats": 2,
    }  # fmt: skip
    checks = [sys.executable, str(HERE / "_gpu_checks.py")]
    return [
        Part(name="checks", commands=(({}, checks),), seconds=150),
        train("sft", big, long),
        peer("sft", big, long),
        ours(f"generate {big}", 70, common | writing | {"size": big}),
        train("dpo", big, long),
        peer("dpo", big, long),
        theirs(f"peer generate {big}", arguments.peer, 60, writing | {"size": big, "dtype": dtype}),
        ours("ppo", 100, iteration, iteration | {"micro_batches": 4, "remat": "block"}),
        train("sft", small, short),
        train("dpo", small, short),
        train("sft", big, short),
        train("sft", small, long),
        train("dpo", small, long),
        train("dpo", big, short),
        ours(f"generate {small}", 70, common | writing | {"size": small}),
        peer("sft", small, short),
        peer("dpo", small, short),
    ]


def carry_out(part: Part, deadline: float) -> dict[str, Any]:
    """Runs a part; gives its record, or why there is none."""
    attempts: list[dict[str, Any]] = []
    for told, command in part.commands:
        left = min(part.seconds, deadline - time.perf_counter())
        if left < LEAST:
            return {"part": part.name, "skipped": "no time left", "attempts": attempts}
        start = time.perf_counter()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=left, env=environment()
            )
        except subprocess.TimeoutExpired:
            attempts.append(told | {"error": f"not done after {left:.0f} s"})
            break
        except OSError as error:
            attempts.append(told | {"error": str(error)})
            break
        seconds = time.perf_counter() - start
        lines = done.stdout.splitlines()
        if done.returncode == 0 and lines:
            record = {"part": part.name, "case": told} | json.loads(lines[-1])
            return record | {"wall_seconds": seconds, "attempts": attempts}
        errors = [line for line in done.stderr.splitlines() if line.strip()]
        why = next((x for x in errors if "RESOURCE_EXHAUSTED" in x or "OutOfMemory" in x), None)
        last = why or (errors or [f"exit status {done.returncode}"])[-1]
        attempts.append(told | {"error": last[:500], "wall_seconds": seconds})
        if why is None:
            break  # less memory would not help
    return {"part": part.name, "error": attempts[-1]["error"], "attempts": attempts}


def environment() -> dict[str, str]:
    """Of the parts: this repository, nothing from outside, and most of the device's memory."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93"),
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def compared(records: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over the peer's tokens a second, where both were measured."""
    speed = {r["part"]: r["tokens_per_second"] for r in records if "tokens_per_second" in r}
    pairs = {name: speed.get(f"peer {name}") for name in speed if not name.startswith("peer ")}
    return {name: round(speed[name] / other, 3) for name, other in pairs.items() if other}


def told(record: dict[str, Any]) -> str:
    """A record in a line."""
    name = f"{record['part']:<22}"
    if "skipped" in record or "error" in record:
        return name + (record.get("skipped") or f"failed: {record['error'][:120]}")
    if record["part"] == "checks":
        largest = ", ".join(f"{k} {v:.2g}" for k, v in record["largest"].items() if v is not None)
        word = "agree" if record["agree"] else f"DIFFER: {len(record['wrong'])}"
        return f"{name}{record['numbers']} numbers {word} ({largest}); {record['attention']}"
    text = f"{name}{record['tokens_per_second']:>12,.0f} tokens/s  {record['step_seconds']:.4g} s"
    if "fraction_of_limit" in record:
        text += f"  {100 * record['fraction_of_limit']:.1f} % of the limit"
    if "fraction_of_bandwidth" in record:
        text += f"  {100 * record['fraction_of_bandwidth']:.1f} % of the bandwidth"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="JSON file to write")
    parser.add_argument("--budget", type=float, default=510, help="seconds for everything")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--peer", default=sys.executable, help="the peer's interpreter")
    parser.add_argument("--only", nargs="+", help="parts whose names begin so")
    arguments = parser.parse_args()
    start = time.perf_counter()
    deadline = start + arguments.budget
    records: list[dict[str, Any]] = []
    for part in plan(arguments):
        if arguments.tiny:  # a slow machine is no reason to fail
            part = dataclasses.replace(part, seconds=arguments.budget)
        if arguments.only and not part.name.startswith(tuple(arguments.only)):
            continue
        records.append(carry_out(part, deadline))
        print(told(records[-1]), flush=True)
        # Written after every part: whatever ends this process early, what is known stays.
        whole = {
            "benchmark": "gpu",
            "tiny": arguments.tiny,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "seconds": round(time.perf_counter() - start, 1),
            "ratios": compared(records),
            "parts": records,
        }
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"ours / peer: {compared(records)}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
