"""PPO on a tiny story model with a sentiment score as reward: score against KL, for several seeds.

    python scripts/bench/story_ppo.py MODEL_FOLDER [--seeds 0 1 2] [--iterations 20] [--out FILE]

MODEL_FOLDER holds a small story model in Hugging Face form (stories260K: 260 K parameters). The
reward is the VADER compound score of the continuation (package vaderSentiment). Score and KL are
means over 512 fresh samples before and after a fixed number of iterations.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import jax
import numpy as np
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

import jaxalign as ja
from jaxalign import ppo
from jaxalign.data.chat import encode_prompt
from jaxalign.data.packing import prompt_rows

OPENINGS = [
    "Once upon a time, there was a",
    "One day, a little girl",
    "Tom had a big",
    "Lily and her mom",
    "The dog was",
    "There was a small cat",
    "A boy named Tim",
    "In the park,",
    "Sara liked to",
    "The sun was",
    "Ben and Mia",
    "Mom said",
    "The old man",
    "A bird sat",
    "One night,",
    "Max was a",
    "Anna found a",
    "The little fish",
    "At the beach,",
    "Sam wanted to",
    "A frog lived",
    "The teacher gave",
    "Lucy had a red",
    "It was raining and",
    "The big tree",
    "Jack went to",
    "Every morning, the",
    "The bunny saw",
    "Dad made a",
    "Two friends were",
    "A tiny mouse",
    "The train was",
]
ROLLOUTS = 128
FRESH = 512


def run(folder: pathlib.Path, seed: int, iterations: int, kl_coef: float, rate: float) -> dict:
    began = time.perf_counter()
    tok = ja.load_tokenizer(folder)
    mesh = ja.make_mesh()
    model, params = ja.load_pretrained(folder, mesh=mesh, compute_dtype="float32")
    ids = [np.asarray(encode_prompt(tok, text, "none"), np.int32) for text in OPENINGS]
    which = [row % len(ids) for row in range(ROLLOUTS)]
    prompts = prompt_rows(ids, which, ROLLOUTS, max(map(len, ids)), tok.pad_token_id)
    judge = SentimentIntensityAnalyzer()
    reward_fn = ja.text_reward(lambda _, text: judge.polarity_scores(text)["compound"], tok)
    config = ppo.Config(
        max_new_tokens=60,
        stop_tokens=(tok.eos_token_id,),
        pad_token=tok.pad_token_id,
        kl_coef=kl_coef,
        vf_coef=0.5,
    )
    critic, critic_params = ja.with_scalar_head(model, params, jax.random.key(seed))
    rates = (rate, 3 * rate)
    tx = ppo.make_optimizer(
        *(
            ja.make_optimizer(ja.OptimizerConfig(learning_rate=r, schedule="constant"))
            for r in rates
        )
    )
    state = ja.init_state(ppo.init_params(params, critic_params), tx)
    step = ja.compile_step(ppo.make_step(model, critic, tx, config), state, mesh)
    prepare = ppo.make_prepare(model, critic, reward_fn, config)

    def measure(number: int) -> tuple[float, float]:
        key = jax.random.fold_in(jax.random.key(10_000 + seed), number)
        rows = []
        for part in range(FRESH // ROLLOUTS):
            rollout = prepare(jax.random.fold_in(key, part), state, params, prompts)
            metrics = ppo.rollout_metrics(rollout)
            rows.append([float(metrics["objective/scores"]), float(metrics["objective/kl"])])
        score, kl = np.mean(rows, axis=0)
        return float(score), float(kl)

    before = measure(0)
    seconds = []
    for iteration in range(iterations):
        started = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(seed), iteration)
        rollout = prepare(key, state, params, prompts)
        for part in ppo.minibatches(key, rollout, epochs=4, count=4):
            state, metrics = step(state, part)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    after = measure(1)
    return {
        "seed": seed,
        "score_before": round(before[0], 4),
        "score_after": round(after[0], 4),
        "kl_after": round(after[1], 3),
        "seconds": round(time.perf_counter() - began, 1),
        "seconds_an_iteration": round(float(np.median(seconds)), 2),
        "compiles": step.compiles,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=26)
    parser.add_argument("--kl-coef", type=float, default=0.015)
    parser.add_argument("--rate", type=float, default=1e-4, help="of the policy; the critic's × 3")
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    given = parser.parse_args()
    for seed in given.seeds:
        row = run(given.model, seed, given.iterations, given.kl_coef, given.rate)
        row |= {"kl_coef": given.kl_coef, "rate": given.rate, "iterations": given.iterations}
        print(json.dumps(row), flush=True)
        if given.out:
            with given.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
