"""What drafts are worth in decoding: looked up in the text, or from the model's first layers.

    python scripts/bench/speculation.py MODEL [--new 96] [--rounds 3] [--speculate 4]
        [--out docs/results/speculation.json]

MODEL is a chat model, a folder or a .gguf file. Greedy answers to two kinds of prompts: "repeats"
asks for a text to be copied, "free" asks questions. For 1, 4 and 16 prompts at a time, plain and
speculative decoding take turns in one process; seconds are medians of the rounds, compiling aside.
`layers` is the share of answer tokens that the first m of L layers predict like the whole model: a
draft token from them is accepted so often, and costs m / L of a step. One draft token pays only if
its share is above its cost.
"""

from __future__ import annotations

import argparse
import dataclasses
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

import jaxalign as ja  # noqa: E402
from jaxalign.data.chat import encode_prompt, stop_token_ids  # noqa: E402
from jaxalign.data.packing import prompt_rows  # noqa: E402

TEXTS = (
    "The harbour was quiet in the morning. Two boats lay at the pier, and a man was mending a net.",
    "Mix the flour with the salt and the sugar, add the butter in small pieces, then cold water.",
    "def area(width, height):\n    if width < 0:\n        raise ValueError(width)\n    return 0",
    "The meeting begins at nine on Tuesday in room 14; bring the report, the plan and the budget.",
)
QUESTIONS = (
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Tell me a short story about a fox.",
    "What is a good way to learn a language?",
)


def prompts_of(kind: str, count: int) -> list[str]:
    """So many prompts of a kind, no two alike."""
    given = [f"Copy this text word for word:\n\n{text}" for text in TEXTS]
    base = given if kind == "repeats" else list(QUESTIONS)
    return [f"{base[i % len(base)]}{' ' * (i // len(base))}" for i in range(count)]


def decode(arguments: argparse.Namespace, model: Any, params: Any, tok: Any) -> list[dict]:
    """Seconds, steps and tokens of plain and speculative decoding, for each kind and number."""
    stops, found = stop_token_ids(tok, None, model), []
    for kind in ("repeats", "free"):
        for count in arguments.rows:
            ids = [
                np.asarray(encode_prompt(tok, prompt), np.int32)
                for prompt in prompts_of(kind, count)
            ]
            length = -(-max(map(len, ids)) // 16) * 16
            rows = prompt_rows(ids, list(range(count)), count, length, tok.pad_token_id or 0)

            def run(speculate: int, rows: Any = rows) -> tuple[float, Any]:
                began = time.perf_counter()
                out = ja.sample(
                    model, params, rows, jax.random.key(0), max_new_tokens=arguments.new,
                    temperature=0.0, stop_tokens=stops, speculate=speculate,
                )  # fmt: skip
                jax.block_until_ready(out.tokens)
                return time.perf_counter() - began, out

            seconds: dict[int, list[float]] = {0: [], arguments.speculate: []}
            outs = {speculate: run(speculate)[1] for speculate in seconds}  # compiles
            for _ in range(arguments.rounds):
                for speculate, times in seconds.items():
                    times.append(run(speculate)[0])
            plain, drafted = (outs[k] for k in seconds)
            medians = [statistics.median(times) for times in seconds.values()]
            same = np.asarray(plain.tokens == drafted.tokens)[np.asarray(plain.mask)]
            found.append(
                {
                    "prompts": kind,
                    "rows": count,
                    "tokens": int(np.asarray(plain.mask).sum()),
                    "steps": [int(plain.steps), int(drafted.steps)],
                    "seconds": [round(x, 3) for x in medians],
                    "speed": round(medians[0] / medians[1], 2),
                    "same_tokens": round(float(same.mean()), 4),
                }
            )
            print(json.dumps(found[-1]), flush=True)
    return found


def layers(arguments: argparse.Namespace, model: Any, params: Any, tok: Any) -> list[dict]:
    """How often the first layers' most likely token is the whole model's."""
    stops, found = stop_token_ids(tok, None, model), []
    count = len(QUESTIONS)
    ids = [np.asarray(encode_prompt(tok, p), np.int32) for p in prompts_of("free", count)]
    length = max(map(len, ids))
    rows = prompt_rows(ids, list(range(count)), count, length, tok.pad_token_id or 0)
    out = ja.sample(
        model, params, rows, jax.random.key(0), max_new_tokens=arguments.new, temperature=0.0,
        stop_tokens=stops,
    )  # fmt: skip
    tokens = np.concatenate([rows.tokens, out.tokens], axis=1)
    given = np.concatenate([rows.mask, out.mask], axis=1)
    positions = np.maximum(given.cumsum(1) - 1, 0)
    total = model.config.num_layers

    def predicted(count: int) -> np.ndarray:
        fewer = dataclasses.replace(
            model, config=dataclasses.replace(model.config, num_layers=count)
        )
        part = params | {"blocks": jax.tree.map(lambda x: x[:count], params["blocks"])}
        run = jax.jit(
            lambda p: fewer.logits(
                p, fewer.apply(p, tokens, positions, given.astype(np.int32))
            ).argmax(-1)
        )
        return np.asarray(run(part))[:, length - 1 : -1]

    whole, mask = predicted(total), np.asarray(out.mask)
    for count in (total // 4, total // 2, 3 * total // 4, total - 2):
        share = float((predicted(count) == whole)[mask].mean())
        found.append({"layers": count, "of": total, "same": round(share, 3)})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--speculate", type=int, default=4)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    model, params = ja.load_pretrained(arguments.model)
    tok = ja.load_tokenizer(arguments.model)
    record = {
        "benchmark": "speculation",
        "model": pathlib.Path(arguments.model).name,
        "decode": decode(arguments, model, params, tok),
        "first_layers": layers(arguments, model, params, tok),
        **machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
