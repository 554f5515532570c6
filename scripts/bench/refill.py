"""What refilled slots are worth: answers of different lengths in groups, in a queue, all at once.

    python scripts/bench/refill.py [--sizes S M] [--prompts 64] [--slots 16] [--new 128]
        [--rounds 3] [--out docs/results/refill.json]

A random Llama answers prompts of 64 tokens. "ragged" answers have drawn lengths from 4 tokens to
the longest, "full" ones all have the longest. `groups`: as many prompts as slots at a time, each
group until its longest answer has ended. `queue`: a finished answer makes room for the next prompt
(`sample(slots=…)`). `all`: a slot for every answer. The three take turns in one process; seconds
are medians of the rounds, compiling aside. `steps` are decode steps, of all groups together.
`step_seconds` is the time of one decode step by the number of its rows, from full answers to so
many prompts.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from _job import machine  # noqa: E402
from _start import random_llama  # noqa: E402

import jaxalign as ja  # noqa: E402

PROMPT = 64
ROWS = (1, 2, 4, 8, 16, 32, 64)


def prompts_of(model: Any, count: int) -> ja.PromptBatch:
    """Random prompts."""
    ids = np.random.default_rng(1).integers(2, model.config.vocab_size, (count, PROMPT))
    rows = np.arange(count, dtype=np.int32)
    return ja.PromptBatch(ids.astype(np.int32), np.ones(ids.shape, bool), rows)


def answer(
    model: Any, params: Any, prompts: ja.PromptBatch, lengths: np.ndarray, new: int, layout: str,
    slots: int,
) -> tuple[float, int]:  # fmt: skip
    """Seconds and decode steps of all answers."""
    size = slots if layout == "groups" else len(lengths)
    steps, began = [], time.perf_counter()
    for start in range(0, len(lengths), size):
        part = slice(start, start + size)
        out = ja.sample(
            model, params, ja.PromptBatch(*(x[part] for x in prompts)), jax.random.key(0),
            max_new_tokens=new, lengths=lengths[part], slots=slots if layout == "queue" else None,
        )  # fmt: skip
        jax.block_until_ready(out.tokens)
        steps.append(int(out.steps))
    return time.perf_counter() - began, sum(steps)


def layouts(arguments: argparse.Namespace, model: Any, params: Any) -> list[dict]:
    """Groups, queue and all at once, for both kinds of answers."""
    found = []
    prompts, new = prompts_of(model, arguments.prompts), arguments.new
    for kind, low in (("ragged", 4), ("full", new)):
        lengths = np.random.default_rng(0).integers(low, new + 1, arguments.prompts)
        given = (model, params, prompts, lengths.astype(np.int32), new)
        seconds: dict[str, list[float]] = {"groups": [], "queue": [], "all": []}
        steps = {layout: answer(*given, layout, arguments.slots)[1] for layout in seconds}
        for _ in range(arguments.rounds):
            for layout, times in seconds.items():
                times.append(answer(*given, layout, arguments.slots)[0])
        medians = {layout: round(statistics.median(times), 3) for layout, times in seconds.items()}
        found.append({"answers": kind, "seconds": medians, "steps": steps})
        print(json.dumps(found[-1]), flush=True)
    return found


def step_seconds(arguments: argparse.Namespace, model: Any, params: Any) -> dict[int, float]:
    """Seconds of a decode step by its rows: two lengths of answers, their difference."""
    long, short = arguments.new, arguments.new // 4
    found = {}
    for rows in ROWS:
        prompts = prompts_of(model, rows)
        given = (model, params, prompts, np.full(rows, long, np.int32), long, "all", rows)
        few = (model, params, prompts, np.full(rows, short, np.int32), long, "all", rows)
        answer(*given), answer(*few)
        pairs = [answer(*given)[0] - answer(*few)[0] for _ in range(arguments.rounds)]
        found[rows] = round(statistics.median(pairs) / (long - short), 6)
    print(json.dumps(found), flush=True)
    return found


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"benchmark": "refill", "prompt_tokens": PROMPT, "sizes": {}}
    record |= {k: v for k, v in vars(arguments).items() if k in ("prompts", "slots", "new")}
    for size in arguments.sizes:
        model, params = random_llama(size)
        record["sizes"][size] = {
            "layouts": layouts(arguments, model, params),
            "step_seconds": step_seconds(arguments, model, params),
        }
    record |= machine()
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
