"""What fewer bits are worth while sampling: weights (`ppo.sampling_weights`) and cache.

    python scripts/bench/narrow_sampling.py [--sizes S M] [--rounds 4] [--out FILE]

A random Llama answers 16 prompts of 64 tokens with 128 tokens each; the forms take turns in one
process, compiling aside; seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from _job import machine  # noqa: E402
from _start import random_llama  # noqa: E402

import jaxalign as ja  # noqa: E402
from jaxalign.sampling.weights import sampling_weights  # noqa: E402

ROWS, PROMPT, NEW = 16, 64, 128
FORMS = {
    "float32": (None, None),
    "cache in bfloat16": (None, "bfloat16"),
    "weights in bfloat16": ("bfloat16", None),
    "weights in int8": ("int8", None),
    "both in bfloat16": ("bfloat16", "bfloat16"),
}
"""Name → dtypes of the weights and of the cache."""


def measure(size: str, rounds: int) -> dict[str, float]:
    """Seconds of each form."""
    model, params = random_llama(size)
    ids = np.random.default_rng(1).integers(2, model.config.vocab_size, (ROWS, PROMPT))
    rows = np.arange(ROWS, dtype=np.int32)
    prompts = ja.PromptBatch(ids.astype(np.int32), np.ones(ids.shape, bool), rows)
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(1 + rounds):
        for name, (weights, cache) in FORMS.items():
            narrow = sampling_weights(model, params, weights)
            jax.block_until_ready(narrow[1])
            began = time.perf_counter()
            out = ja.sample(
                *narrow, prompts, jax.random.key(number), max_new_tokens=NEW, cache_dtype=cache
            )
            jax.block_until_ready(out.tokens)
            if number:
                seconds[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(x), 3) for name, x in seconds.items()}


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["S", "M"])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    found = {size: measure(size, arguments.rounds) for size in arguments.sizes}
    record = {"benchmark": "narrow_sampling", "seconds": found}
    print(json.dumps(record))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record | machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()
