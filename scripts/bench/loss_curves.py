"""Twenty steps of DPO and of reward training in jaxalign and in TRL from one start: loss curves.

    PEER=$(bash scripts/bench/_peers.sh trl-1.16.0)
    python scripts/bench/loss_curves.py instruction-data-with-preference.json --peer $PEER \
        --work FOLDER --random TOKENIZER --model stories260K=FOLDER \
        --out docs/results/loss_curves.jsonl

The data are pairs of a polite and a rude answer. `--random` adds a random Llama (vocabulary 8192,
hidden 256, 4 layers) under the given tokenizer, `--model` a model (LABEL=folder, GGUF file or hub
id). Both sides get the same weights, token ids, order and hyperparameters, in float32; ours
packs its rows, TRL pads them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

from _job import (
    Job,
    Pairs,
    append,
    carry_out,
    curve_difference,
    machine,
    read_steps,
    save_pairs,
    write_job,
)


def prepare(
    algorithm: str, label: str, source: str | None, arguments: argparse.Namespace
) -> tuple[pathlib.Path, Job]:
    """Writes weights, tokens and the job of one comparison."""
    from _start import random_llama, read_pairs, save_start

    import jaxalign as ja

    work = arguments.work.absolute() / f"{label}-{algorithm}"
    work.mkdir(parents=True, exist_ok=True)
    tok = ja.load_tokenizer(arguments.random if source is None else source)
    if not (work / "start").exists():
        model, params = random_llama("S") if source is None else ja.load_pretrained(source)
        save_start(algorithm, model, params, work / "start", tok)
        template = "chatml" if tok.chat_template is not None else "none"
        pairs: Pairs = read_pairs(arguments.data, tok, arguments.length, template)
        save_pairs(work / "train.npz", pairs.take(0, arguments.steps * arguments.pairs))
    job = Job(
        algorithm=algorithm,
        model=str(work / "start"),
        train=str(work / "train.npz"),
        steps=arguments.steps,
        pairs=arguments.pairs,
        length=arguments.length,
        peer_pairs=arguments.pairs,
        layout="packed",
        row_length=arguments.length,
        learning_rate=arguments.rate,
        warmup_steps=2,
        threads=arguments.threads,
    )
    write_job(work, job)
    return work, job


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=pathlib.Path, help="instruction-data-with-preference.json")
    parser.add_argument("--peer", required=True, help="interpreter of TRL's environment")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--random", help="tokenizer (at most 8192 words) of a random Llama")
    parser.add_argument(
        "--model", action="append", default=[], metavar="LABEL=SOURCE", help="may be repeated"
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=256, help="tokens of a side")
    parser.add_argument("--rate", type=float, default=5e-5, help="peak learning rate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    models: dict[str, str | None] = {"random-S": None} if arguments.random else {}
    models |= dict(text.split("=", 1) for text in arguments.model if "=" in text)
    if not models or len(models) < len(arguments.model):
        parser.error("wanted --random TOKENIZER or --model LABEL=SOURCE")
    for label, source in models.items():
        for algorithm in ("dpo", "reward"):
            work, job = prepare(algorithm, label, source, arguments)
            pythons = {"ours": sys.executable, "trl": arguments.peer}
            curves, versions = {}, {}
            for side, python in pythons.items():
                versions |= carry_out(side, python, work, job.threads)["versions"]
                steps = read_steps(work / side / "steps.jsonl")
                curves[side] = [round(step["loss"], 7) for step in steps]
            row = {"benchmark": "loss_curves", "model": label, "algorithm": algorithm}
            row |= {"max_difference": float(f"{curve_difference(*curves.values()):.2g}")}
            row |= {"steps": job.steps, "pairs": job.pairs, "learning_rate": job.learning_rate}
            row |= {"curves": curves, **machine(), "versions": versions}
            print(json.dumps(row | {"curves": {k: v[::5] for k, v in curves.items()}}))
            if arguments.out is not None:
                append(arguments.out, row)


if __name__ == "__main__":
    main()
