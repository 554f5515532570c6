"""What GRPO's passes cost one answer a row, packed, and with prompts that their answers share.

    python scripts/bench/shared_prompts.py [--size S] [--prompt 256] [--answer 64] [--rounds 5]
        [--out docs/results/shared_prompts.json]

One process, random weights; 16 prompts of half to the full length with 8 answers each, of an eighth
to the full length. A round computes the experience (log-probabilities of policy and reference) and
one update in each layout in turn. Processor seconds, medians of the rounds; sampling is left out.
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
import optax  # noqa: E402
from _job import machine  # noqa: E402

import jaxalign as ja  # noqa: E402
from jaxalign import ppo  # noqa: E402
from jaxalign.commands.bench import SIZES  # noqa: E402
from jaxalign.types import TokenBatch  # noqa: E402

PROMPTS, SAMPLES, SHAPES = 16, 8, 16
LAYOUTS: dict[str, dict[str, Any]] = {
    "one answer a row": {},
    "packed": {"pack_experience": SHAPES},
    "packed, shared prompts": {"pack_experience": SHAPES, "shared_prompts": True},
}


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--answer", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    out = vars(options).pop("out")
    result = vars(options) | measure(options.size, options.prompt, options.answer, options.rounds)
    result |= machine() | {"jax": jax.__version__}
    print(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def measure(size: str, prompt: int, answer: int, rounds: int) -> dict[str, Any]:
    """Processor seconds of experience and update by layout."""
    model: Any = ja.Decoder(SIZES[size])
    tokens = rows(SIZES[size].vocab_size, prompt, answer)
    rng = np.random.default_rng(1)
    scores = rng.normal(size=PROMPTS * SAMPLES).astype(np.float32)
    finished = np.ones(PROMPTS * SAMPLES, bool)
    reference = model.init(jax.random.key(0))
    tx = optax.adamw(1e-5)
    found = {}
    for name, packing in LAYOUTS.items():
        config = ppo.Config(
            advantage_estimator="grpo", samples=SAMPLES, kl_in="loss", kl_estimator="k3",
            max_new_tokens=answer, **packing,
        )  # fmt: skip
        experience = ppo.make_experience(model, None, config)
        step = jax.jit(ppo.make_step(model, None, tx, config), donate_argnums=0)
        state = ja.init_state(ppo.init_params(model.init(jax.random.key(0))), tx)
        seconds: dict[str, list[float]] = {"experience": [], "update": []}
        shape = None
        for _ in range(1 + rounds):  # the first one compiles
            began = time.process_time()
            rollout = jax.block_until_ready(experience(state, reference, tokens, scores, finished))
            seconds["experience"].append(time.process_time() - began)
            began = time.process_time()
            samples = SAMPLES if config.shared_prompts else 1
            (batch,) = ppo.minibatches(
                jax.random.key(2), rollout, 1, 1, pack=config.pack_experience, samples=samples
            )
            state, _ = jax.block_until_ready(step(state, batch))
            seconds["update"].append(time.process_time() - began)
            shape = batch.tokens.inputs.shape
        medians = {part: round(statistics.median(x[1:]), 2) for part, x in seconds.items()}
        found[name] = {"rows": list(shape or ())} | medians
    return {"processor_seconds": found}


def rows(vocab: int, prompt: int, answer: int) -> TokenBatch:
    """Prompts with their answers, as `join_tokens` lays them: `[128, prompt + answer]`."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(prompt // 2, prompt + 1, PROMPTS).repeat(SAMPLES)[:, None]
    answers = rng.integers(answer // 8, answer + 1, (PROMPTS * SAMPLES, 1))
    column = np.arange(prompt + answer)[None]
    there = (column >= prompt - lengths) & (column < prompt + answers)
    prompts = rng.integers(3, vocab, (PROMPTS, prompt)).repeat(SAMPLES, 0)
    written = rng.integers(3, vocab, (PROMPTS * SAMPLES, answer))
    ids = np.where(there, np.concatenate([prompts, written], 1), 0).astype(np.int32)
    return TokenBatch(
        inputs=ids,
        targets=np.append(ids[:, 1:], np.zeros_like(ids[:, :1]), 1),
        positions=np.maximum(np.cumsum(there, 1) - 1, 0).astype(np.int32),
        segment_ids=there.astype(np.int32),
        loss_mask=(column >= prompt - 1) & (column < prompt - 1 + answers),
    )


if __name__ == "__main__":
    main()
