"""One NVIDIA GPU in parts: are the numbers right, and how fast are the steps?

    python scripts/bench/gpu.py --out docs/results/gpu.json          # most of it in 9 minutes
    python scripts/bench/gpu.py --out docs/results/gpu.json          # again: what is still missing
    python scripts/bench/gpu.py --out docs/results/gpu.json --part dpo ppo-split    # these anew
    python scripts/bench/gpu.py --tiny --out /tmp/tiny.json          # tries the script on a CPU

First every step (SFT, reward, DPO, PPO, generation) is compared with a CPU's numbers
(`_gpu_checks.py`). Then come the measurements (`_gpu_parts.py`): SFT of the shape of Qwen3-0.6B on
packed rows of 8k and 16k tokens, LoRA of Llama-3.1-8B's, decoding with 1 to 256 slots beside what
the memory's bandwidth allows, DPO, an iteration of PPO and what each part of it takes. Beside them
runs TRL where it is installed, else transformers in a plain loop (`_gpu_peer.py`, in the
interpreter `--peer`). Each part is a process of its own with a deadline, and the file is written
after each. A part that fails, runs out of memory (it is tried again with less) or has no time left
is noted there, and the rest goes on. The next call runs those, and none that is measured. Needs
jax, flax, optax and this repository; for the peer torch and transformers.
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
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from _gpu_parts import Choice, Part, parts  # noqa: E402

LEAST = 20.0
"""Seconds below which no further part is started."""

PUBLISHED = {
    "sft-8k": {"tokens_per_second": 26010, "mfu": 0.168},
    "sft-16k": {"tokens_per_second": 25490, "mfu": 0.237},
}
"""What prime-rl's public benchmark file says of one H100 and the same model and lengths."""

Record = dict[str, Any]


def carry_out(part: Part, deadline: float) -> Record:
    """Runs a part; gives its record, or why there is none."""
    attempts: list[Record] = []
    for told, command in part.commands:
        left = min(part.seconds, deadline - time.perf_counter())
        if left < LEAST:
            return {"part": part.name, "skipped": "no time left", "attempts": attempts}
        record, why = attempt(told, command, left)
        if why is None:
            return {"part": part.name, "case": told} | record | {"attempts": attempts}
        if part.optional and "ModuleNotFoundError" in why:
            return {"part": part.name, "skipped": why, "attempts": attempts}
        attempts.append(told | record | {"error": why})
        if "RESOURCE_EXHAUSTED" not in why and "OutOfMemory" not in why:
            break  # less memory would not help
    return {"part": part.name, "error": attempts[-1]["error"], "attempts": attempts}


def attempt(told: Choice, command: list[str], seconds: float) -> tuple[Record, str | None]:
    """Runs one program; gives what it printed and None, or {} and its error."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment()
        )
    except subprocess.TimeoutExpired:
        return {}, f"not done after {seconds:.0f} s"
    except OSError as error:
        return {}, str(error)
    wall = {"wall_seconds": time.perf_counter() - start}
    lines = done.stdout.splitlines()
    if done.returncode == 0 and lines:
        return json.loads(lines[-1]) | wall, None
    errors = [line for line in done.stderr.splitlines() if line.strip()]
    full = next((x for x in errors if "RESOURCE_EXHAUSTED" in x or "OutOfMemory" in x), None)
    last = full or (errors or [f"exit status {done.returncode}"])[-1]
    return wall, last[:500]


def environment() -> dict[str, str]:
    """Of the parts: this repository, nothing from outside, and most of the device's memory."""
    paths = [str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.93"),
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def compared(records: list[Record]) -> dict[str, float]:
    """Ours over the peer's tokens a second, where both were measured."""
    speed = {r["part"]: r["tokens_per_second"] for r in records if "tokens_per_second" in r}
    pairs = {name: speed.get(f"trl-{name}") for name in speed if not name.startswith("trl-")}
    return {name: round(speed[name] / other, 3) for name, other in pairs.items() if other}


def is_done(record: Record) -> bool:
    """Whether a part was measured."""
    return "error" not in record and "skipped" not in record


def told(record: Record) -> str:
    """A record in a line."""
    name = f"{record['part']:<16}"
    if not is_done(record):
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
    split = {k: v for k, v in record.get("parts", {}).items() if record["part"].startswith("ppo")}
    if split:
        text += "  " + ", ".join(f"{k} {v:.3g} s" for k, v in split.items())
    published = PUBLISHED.get(record["part"])
    if published and record.get("case", {}).get("size") == "Qwen3-0.6B":
        text += f"  (prime-rl, one H100: {published['tokens_per_second']:,} tokens/s)"
    return text


def read(path: pathlib.Path, *, tiny: bool) -> list[Record]:
    """The records of earlier calls.

    Raises:
      SystemExit: they are of other shapes, or no records.
    """
    if not path.exists():
        return []
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        records, was = whole["parts"], whole["tiny"]
    except (ValueError, KeyError, TypeError):
        raise SystemExit(f"{path} holds no results of this script; give another file") from None
    if was != tiny:
        raise SystemExit(
            f"{path} holds results {'with' if was else 'without'} --tiny; give another file"
        )
    return records


def write(path: pathlib.Path, records: list[Record], *, tiny: bool, seconds: float) -> None:
    """Replaces the file as a whole, so that a call that is cut off leaves what there was."""
    whole = {
        "benchmark": "gpu",
        "tiny": tiny,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        "ratios": compared(records),
        "published": PUBLISHED,
        "parts": records,
    }
    fresh = path.with_name(f".{path.name}.tmp")
    fresh.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)


def chosen(every: list[Part], names: list[str] | None, done: set[str]) -> list[Part]:
    """The parts to run: those named, by the beginnings of their names; else all that lack.

    Raises:
      SystemExit: no part has such a name.
    """
    if not names:
        return [part for part in every if part.name not in done]
    for name in names:
        if not any(part.name.startswith(name) for part in every):
            known = ", ".join(part.name for part in every)
            raise SystemExit(f"--part {name}: wanted one or more of {known}")
    return [part for part in every if part.name.startswith(tuple(names))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=pathlib.Path, required=True, help="JSON file, kept up to date"
    )
    parser.add_argument("--budget", type=float, default=510, help="seconds for this call")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--peer", default=sys.executable, help="the peer's interpreter")
    parser.add_argument(
        "--part", "--only", nargs="+", metavar="NAME", help="these parts, measured or not"
    )
    arguments = parser.parse_args()
    start = time.perf_counter()
    every = parts(tiny=arguments.tiny, peer=arguments.peer)
    records = {record["part"]: record for record in read(arguments.out, tiny=arguments.tiny)}
    done = {name for name, record in records.items() if is_done(record)}
    for part in chosen(every, arguments.part, done):
        if arguments.tiny:  # a slow machine is no reason to fail
            part = dataclasses.replace(part, seconds=arguments.budget)
        record = carry_out(part, start + arguments.budget)
        print(told(record), flush=True)
        if is_done(record) or part.name not in done:  # what was measured stays
            records[part.name] = record
        order = [records[one.name] for one in every if one.name in records]
        seconds = time.perf_counter() - start
        write(arguments.out, order, tiny=arguments.tiny, seconds=seconds)
    ratios = compared(list(records.values()))
    print(f"ours / peer: {ratios}; {time.perf_counter() - start:.0f} s in this call")


if __name__ == "__main__":
    main()
