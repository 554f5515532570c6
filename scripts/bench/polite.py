"""Polite against rude: DPO by jaxalign's own pipeline, and a reward model with best-of-4 beside it.

    python scripts/bench/polite.py MODEL instruction-data-with-preference.json --work FOLDER \
        --out docs/results/polite.jsonl [stage.key=value …]

MODEL is a small chat model (SmolLM2-135M-Instruct: a folder, GGUF file or hub id). Pairs whose two
answers are the same are left out (and counted); of the rest, ordered by their SHA-256, the first
110 are held out. `polite.yaml` is the recipe; overrides are passed on to it. Then:

* the start and the DPO model answer held-out instructions greedily;
* the model whose weights lie halfway between the two, which is polite now and then (the start
  hardly ever is), samples 4 answers to each of them, and the reward model chooses the best. Whether
  that is the politer one is judged by two that took no part in the choice: the DPO model's implicit
  reward log π − log π_start, and a list of polite phrases.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import re
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from _job import append, machine, wilson

# A device a core: see docs/performance.md.
if __name__ == "__main__":  # whoever imports this has devices of its own
    os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(len(os.sched_getaffinity(0))))

HELD_OUT = 110
PHRASES = re.compile(
    r"\b(please|kindly|thank|happy to|glad to|pleasure|certainly|of course|indeed|could you|"
    r"would you|may i|i hope|let me know|i would say|might be|could be|sure|welcome|lovely|"
    r"wonderful|appreciate|i'd|respectfully|may be)\b",
    re.IGNORECASE,
)


def split(rows: Sequence[dict[str, str]], held_out: int) -> tuple[list[dict], list[dict], int]:
    """Training rows, held-out rows, and how many were left out because their answers are equal."""
    kept = [row for row in rows if row["chosen"].strip() != row["rejected"].strip()]

    def digest(row: dict[str, str]) -> bytes:
        text = json.dumps([row[k] for k in ("instruction", "input", "chosen", "rejected")])
        return hashlib.sha256(text.encode()).digest()

    kept.sort(key=digest)
    return kept[held_out:], kept[:held_out], len(rows) - len(kept)


def polite(text: str) -> bool:
    """Whether a text has one of the polite phrases."""
    return PHRASES.search(text) is not None


def choose(scores: np.ndarray, implicit: np.ndarray) -> dict[str, Any]:
    """Compares the reward model's choice with DPO's implicit reward.

    Args:
      scores: `[N, 4]`, by the reward model.
      implicit: `[N, 4]`, log-ratio of the DPO model to its start.
    """
    best = scores.argmax(1)
    rows = np.arange(len(best))
    return {
        "score_all": round(float(scores.mean()), 3),
        "score_best": round(float(scores[rows, best].mean()), 3),
        "implicit_all": round(float(implicit.mean()), 3),
        "implicit_best": round(float(implicit[rows, best].mean()), 3),
        # 0.25 by chance
        "same_choice": round(float(np.mean(implicit.argmax(1) == best)), 3),
    }


def write_lines(path: pathlib.Path, rows: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stages(arguments: argparse.Namespace, data: dict[str, str]) -> list[tuple[str, Any]]:
    """The recipe with model, data and folders filled in."""
    from jaxalign.run.config.yaml import read_yaml
    from jaxalign.run.pipeline import load_stages

    recipe = read_yaml(pathlib.Path(__file__).with_name("polite.yaml"))
    recipe["folder"] = str(arguments.work / "stages")
    recipe["defaults"]["model"]["source"] = arguments.model
    dpo = next(stage for stage in recipe["stages"] if stage["name"] == "dpo")
    dpo["reference_cache"] = str(arguments.work / "reference")
    recipe["defaults"]["data"] |= {"train": [data["train"]], "eval": [data["held_out"]]}
    return load_stages(recipe, arguments.overrides)


def greedy(source: str, prompts: list[Any], new_tokens: int) -> list[str]:
    """Greedy answers."""
    import jaxalign as ja

    model, params = ja.load_pretrained(source)
    return ja.generate(
        model,
        params,
        ja.load_tokenizer(source),
        prompts,
        max_new_tokens=new_tokens,
        temperature=0.0,
        chat_template="chatml",
    )


def best_of_four(
    arguments: argparse.Namespace, results: dict[str, Any], rows: list[dict], prompts: list[Any]
) -> tuple[dict[str, Any], list[dict]]:
    """Samples four answers to each prompt; figures and examples of the choice."""
    import jax

    import jaxalign as ja
    from jaxalign import dpo

    model, params = ja.load_pretrained(arguments.model)
    tok = ja.load_tokenizer(arguments.model)
    _, dpo_params = ja.load_pretrained(str(results["dpo"].model))
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, params, dpo_params)
    answers = ja.generate(
        model,
        halfway,
        tok,
        [prompt for prompt in prompts for _ in range(4)],
        max_new_tokens=arguments.new_tokens,
        temperature=1.0,
        key=jax.random.key(0),
        chat_template="chatml",
    )
    whole = [
        (row, four)
        for row, four in zip(rows, np.reshape(answers, (-1, 4)).tolist(), strict=True)
        if all(text.strip() for text in four)
    ]
    # As pairs, two of the four answers a row, they can be read by what reads preferences.
    pairs = [
        {"instruction": row["instruction"], "input": row["input"], "chosen": a, "rejected": b}
        for row, four in whole
        for a, b in (four[:2], four[2:])
    ]
    path = write_lines(arguments.work / "samples.jsonl", pairs)
    batches = list(
        ja.preference_batches(
            [path], tok, rows=8, length=256, shuffle=False, chat_template="chatml"
        )
    )
    scorer, rm_params = ja.load_pretrained(str(results["reward"].model))
    score = jax.jit(lambda params, tokens: ja.pooled_scores(scorer, params, tokens))
    logps = dpo.make_prepare(model)

    def by_prompt(columns: list[tuple[Any, Any]]) -> np.ndarray:
        both = np.concatenate([np.stack([np.asarray(x) for x in pair], 1) for pair in columns])
        return both[: len(pairs)].reshape(-1, 4)

    scores = by_prompt(
        [(score(rm_params, b.chosen), score(rm_params, b.rejected)) for b in batches]
    )
    after, before = (by_prompt([logps(p, b)[2:4] for b in batches]) for p in (dpo_params, params))
    implicit = after - before
    figures = choose(scores, implicit) | {"prompts": len(whole), "left_out": len(rows) - len(whole)}
    chosen = [four[i] for (_, four), i in zip(whole, scores.argmax(1), strict=True)]
    figures["polite_all"] = round(float(np.mean([polite(t) for _, four in whole for t in four])), 3)
    figures["polite_best"] = round(float(np.mean([polite(text) for text in chosen])), 3)
    examples = [
        {
            "instruction": row["instruction"],
            "best": four[int(s.argmax())],
            "worst": four[int(s.argmin())],
        }
        for (row, four), s in zip(whole, scores, strict=True)
    ]
    return figures, examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, GGUF file or hub id")
    parser.add_argument("data", type=pathlib.Path, help="instruction-data-with-preference.json")
    parser.add_argument("overrides", nargs="*", metavar="stage.key=value")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts to answer")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--shown", type=int, default=6, help="examples in the results")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON line is appended here")
    arguments = parser.parse_intermixed_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()

    from jaxalign.data.rows import to_preference
    from jaxalign.data.sources import read_rows
    from jaxalign.run.pipeline import run_stages

    rows, held_out, equal = split(json.loads(arguments.data.read_text()), HELD_OUT)
    print(
        f"{len(rows)} pairs to train on, {len(held_out)} held out, {equal} left out: equal answers"
    )
    data = {
        "train": write_lines(arguments.work / "train.jsonl", rows),
        "held_out": write_lines(arguments.work / "held_out.jsonl", held_out),
    }
    results = run_stages(stages(arguments, data))

    asked = held_out[: arguments.prompts]
    prompts = [list(to_preference(row).prompt) for row in read_rows([data["held_out"]])][
        : len(asked)
    ]
    answers = {
        name: greedy(source, prompts, arguments.new_tokens)
        for name, source in (("start", arguments.model), ("dpo", str(results["dpo"].model)))
    }
    figures, examples = best_of_four(arguments, results, asked, prompts)

    row: dict[str, Any] = {"benchmark": "polite", **machine(), "overrides": arguments.overrides}
    row |= {"train": len(rows), "held_out": len(held_out), "equal_answers_left_out": equal}
    for stage, name in (("dpo", "rewards/accuracies"), ("reward", "accuracy")):
        result = results[stage]
        right = round(result.after[name] * len(held_out))
        row[stage] = {
            "accuracy_before": round(result.before[name], 4),
            "accuracy": round(result.after[name], 4),
            "ci95": [round(x, 4) for x in wilson(right, len(held_out))],
            "steps": len(result.history),
            "seconds": round(result.seconds),
        }
    row["polite_phrases"] = {
        name: round(float(np.mean([polite(text) for text in texts])), 3)
        for name, texts in (
            ("chosen", [pair["chosen"] for pair in held_out]),
            ("rejected", [pair["rejected"] for pair in held_out]),
            *answers.items(),
        )
    }
    row["best_of_4"] = figures
    row["seconds"] = round(time.perf_counter() - began)
    row["greedy_examples"] = [
        {"instruction": pair["instruction"], "input": pair["input"]}
        | {name: texts[i].strip() for name, texts in answers.items()}
        for i, pair in enumerate(asked[: arguments.shown])
    ]
    row["best_of_4_examples"] = examples[: arguments.shown]
    print(json.dumps(row, indent=1, ensure_ascii=False))
    if arguments.out is not None:
        append(arguments.out, row)


if __name__ == "__main__":
    main()
