"""What scoring answers as they end is worth (`ppo.score_early`), with a reward that takes its time.

    python scripts/bench/early_scores.py [--seconds 0.02] [--size M] [--rounds 3]

A random Llama answers 32 prompts of 64 tokens with 4 to 128 tokens, drawn; the reward function
sleeps so many seconds an answer, as one that waits for a test run or a server does. Rollouts with
and without early scores take turns in one process, compiling aside; seconds are medians.
"""

from __future__ import annotations

import argparse
import functools
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
from jaxalign import ppo, rewards  # noqa: E402
from jaxalign.algorithms.ppo import prepare as ppo_prepare  # noqa: E402
from jaxalign.sampling.generate import sample  # noqa: E402

PROMPTS, PROMPT, NEW = 32, 64, 128


class Ids:
    """A tokenizer whose text is the ids."""

    def decode(self, ids: np.ndarray, **_: object) -> str:
        """The ids, in decimal."""
        return " ".join(map(str, ids))


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=0.02)
    parser.add_argument("--size", default="M")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    model, params = random_llama(arguments.size)
    rng = np.random.default_rng(0)
    ids = rng.integers(2, model.config.vocab_size, (PROMPTS, PROMPT)).astype(np.int32)
    prompts = ja.PromptBatch(ids, np.ones(ids.shape, bool), np.arange(PROMPTS, dtype=np.int32))
    lengths = rng.integers(4, NEW + 1, PROMPTS).astype(np.int32)
    ppo_prepare.sample = functools.partial(sample, lengths=lengths)

    def score(prompt: str, completion: str) -> float:
        time.sleep(arguments.seconds)
        return float(len(completion))

    reward = rewards.text_reward(score, Ids())  # pyrefly: ignore[bad-argument-type]
    options = {"advantage_estimator": "reinforce++", "max_new_tokens": NEW}
    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-6))
    state = ja.init_state(ppo.init_params(params), tx)
    seconds: dict[str, list[float]] = {"late": [], "early": []}
    prepares = {
        name: ppo.make_prepare(
            model, None, reward, ppo.Config(**options, score_early=name == "early")
        )
        for name in seconds
    }
    for number in range(1 + arguments.rounds):
        for name, prepare in prepares.items():
            began = time.perf_counter()
            jax.block_until_ready(prepare(jax.random.key(0), state, params, prompts))
            if number:
                seconds[name].append(time.perf_counter() - began)
    record = {"benchmark": "early_scores", "size": arguments.size, "sleep": arguments.seconds}
    record["seconds"] = {name: round(statistics.median(x), 3) for name, x in seconds.items()}
    print(json.dumps(record))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record | machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()
