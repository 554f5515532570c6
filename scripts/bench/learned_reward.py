"""A learned reward in the loop: reward model on polite against rude, PPO against it, KL and score.

    python scripts/bench/learned_reward.py MODEL instruction-data-with-preference.json \
        --work FOLDER --out docs/results/learned_reward.jsonl [--scorer MODEL] [stage.key=value …]

MODEL is a small language model (stories260K), which first learns from polite and rude answers
alike, so that it writes either. The reward model starts from `--scorer` (by default from MODEL),
and is judged on pairs that it never saw (`polite.py` tells how they are held out). PPO answers the
instructions of the training pairs; score and KL (nats an answer) are those of fresh answers to the
held-out instructions, before and after, once for each of `--kl-coefs`; `learned_reward.yaml` is the
recipe. The share of polite phrases is a judge that took no part.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time
from typing import Any

# A device a core: see docs/performance.md.
if __name__ == "__main__":  # whoever imports this has devices of its own
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(len(os.sched_getaffinity(0))))

import jax
import numpy as np
from _job import append, machine, wilson
from polite import HELD_OUT, polite, split, write_lines

import jaxalign as ja
from jaxalign.run.config.yaml import merge, read_yaml
from jaxalign.run.pipeline import load_stages, run_stages


def stage_name(kl_coef: float) -> str:
    """Without a dot, which would end the name of a stage in an override."""
    return f"ppo-{kl_coef:g}".replace(".", "_")


def stages(arguments: argparse.Namespace, rows: list[dict], held_out: list[dict]) -> Any:
    """The recipe with models, data and folders filled in."""

    def instruct(row: dict[str, str], answer: str) -> dict[str, str]:
        return {key: row[key] for key in ("instruction", "input")} | {"output": row[answer]}

    data = {
        "sft": [instruct(row, answer) for row in rows for answer in ("chosen", "rejected")],
        "pairs": rows,
        "held_out": held_out,
    }
    data = {k: write_lines(arguments.work / f"{k}.jsonl", lines) for k, lines in data.items()}
    recipe = read_yaml(pathlib.Path(__file__).with_name("learned_reward.yaml"))
    recipe["folder"] = str(arguments.work / "stages")
    recipe["defaults"]["model"]["source"] = arguments.model
    ppo = recipe["stages"].pop()
    for kl_coef in arguments.kl_coefs:
        changes = {"name": stage_name(kl_coef), "ppo": {"kl_coef": kl_coef}}
        recipe["stages"].append(merge(ppo, changes))
    for stage in recipe["stages"]:
        if stage["algorithm"] == "sft":
            stage["data"]["train"] = [data["sft"]]
            continue
        stage["data"] |= {"train": [data["pairs"]], "eval": [data["held_out"]]}
        if stage["algorithm"] == "reward" and arguments.scorer:
            stage["model"] = {"source": arguments.scorer}
    return load_stages(recipe, arguments.overrides)


def sampled(source: str, path: str, new_tokens: int) -> list[str]:
    """An answer of the model to each instruction, sampled."""
    from jaxalign.data.rows import to_preference
    from jaxalign.data.sources import read_rows

    model, params = ja.load_pretrained(source)
    prompts = [list(to_preference(row).prompt) for row in read_rows([path])]
    return ja.generate(
        model, params, ja.load_tokenizer(source), prompts, max_new_tokens=new_tokens,
        temperature=1.0, key=jax.random.key(0), chat_template="alpaca",
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, GGUF file or hub id")
    parser.add_argument("data", type=pathlib.Path, help="instruction-data-with-preference.json")
    parser.add_argument("overrides", nargs="*", metavar="stage.key=value")
    parser.add_argument("--scorer", help="where the reward model starts; default: MODEL")
    parser.add_argument("--kl-coefs", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--new-tokens", type=int, default=64, help="of the answers shown")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON line is appended here")
    arguments = parser.parse_intermixed_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    rows, held_out, equal = split(json.loads(arguments.data.read_text()), HELD_OUT)
    results = run_stages(stages(arguments, rows, held_out))

    reward = results["reward"]
    right = round(reward.after["accuracy"] * len(held_out))
    row: dict[str, Any] = {"benchmark": "learned_reward", **machine()}
    row |= {"overrides": arguments.overrides, "train": len(rows), "held_out": len(held_out)}
    row |= {"equal_answers_left_out": equal}
    row["reward"] = {
        "accuracy_before": round(reward.before["accuracy"], 4),
        "accuracy": round(reward.after["accuracy"], 4),
        "ci95": [round(x, 4) for x in wilson(right, len(held_out))],
        "seconds": round(reward.seconds),
    }
    frontier: list[dict[str, Any]] = []
    answers: dict[str, list[str]] = {}
    asked = str(arguments.work / "held_out.jsonl")
    answers["start"] = sampled(str(results["sft"].model), asked, arguments.new_tokens)
    for kl_coef in arguments.kl_coefs:
        name = stage_name(kl_coef)
        result = results[name]
        answers[name] = sampled(str(result.model), asked, arguments.new_tokens)
        frontier.append(
            {
                "kl_coef": kl_coef,
                "iterations": len(result.history),
                "score_before": round(result.before["objective/scores"], 3),
                "score": round(result.after["objective/scores"], 3),
                "kl": round(result.after["objective/kl"], 3),
                "seconds": round(result.seconds),
            }
        )
    row["frontier"] = frontier
    row["polite_phrases"] = {
        "chosen": round(float(np.mean([polite(pair["chosen"]) for pair in held_out])), 3),
        "rejected": round(float(np.mean([polite(pair["rejected"]) for pair in held_out])), 3),
    } | {
        name: round(float(np.mean([polite(t) for t in texts])), 3)
        for name, texts in answers.items()
    }
    row["examples"] = [
        {"instruction": pair["instruction"]} | {name: texts[i] for name, texts in answers.items()}
        for i, pair in enumerate(held_out[:4])
    ]
    row["seconds"] = round(time.perf_counter() - began)
    print(json.dumps(row, indent=1, ensure_ascii=False))
    if arguments.out is not None:
        append(arguments.out, row)


if __name__ == "__main__":
    main()
