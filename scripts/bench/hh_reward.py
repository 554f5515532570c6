"""Reward models of human preferences, jaxalign beside TRL: held-out accuracy on HH-RLHF.

    PEER=$(bash scripts/bench/_peers.sh trl-1.16.0)
    python scripts/bench/hh_reward.py MODEL harmless-base-test.jsonl.gz --peer $PEER --work FOLDER \
        --out docs/results/hh_reward.jsonl

MODEL is a small language model (SmolLM2-135M-Instruct: a folder, GGUF file or hub id), the data the
2,312 pairs of HH-RLHF's `harmless-base` test file (Bai et al. 2022, arXiv 2204.05862), transcripts
as they are. The pairs are ordered by the SHA-256 of their line; the first 312 are held out, those
after them are trained on for one epoch in that order. A transcript is its text and the end token;
longer ones keep their last 192 tokens. Both sides start from the same weights and scalar head and
take the same pairs in the same order with the same optimizer, in float32. `--work` keeps what is
done, so a run that was cut goes on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import pathlib
import sys

import numpy as np
from _job import (
    Job,
    Pairs,
    accuracy,
    append,
    carry_out,
    load_pairs,
    machine,
    read_steps,
    save_pairs,
    write_job,
)

LENGTH = 192
PAIRS = 12


def ordered(lines: list[str]) -> list[str]:
    """The lines by their SHA-256: a fixed order that has nothing to do with their content."""
    return sorted(lines, key=lambda line: hashlib.sha256(line.encode()).digest())


def keep_end(ids: list[int], length: int) -> np.ndarray:
    """The last `length` tokens."""
    return np.asarray(ids[-length:], np.int32)


def split(path: pathlib.Path, train: int, held_out: int, encode) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs as token ids.

    Args:
      path: JSON lines with `chosen` and `rejected`, gzipped.
      train: how many pairs to train on.
      held_out: how many pairs to hold out.
      encode: text → token ids, without special tokens.
    """
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = ordered([line for line in file if line.strip()])
    if held_out + train > len(lines):
        raise ValueError(f"{path} has {len(lines)} pairs, wanted {held_out} + {train}")

    def pairs(part: list[str]) -> Pairs:
        rows = [json.loads(line) for line in part]
        sides = [
            [keep_end(encode(row[side].strip()), LENGTH) for row in rows]
            for side in ("chosen", "rejected")
        ]
        # A reward model reads whole transcripts: there is no prompt to leave out.
        return Pairs(*sides, np.zeros(len(rows), np.int32))

    return pairs(lines[held_out : held_out + train]), pairs(lines[:held_out])


def prepare(arguments: argparse.Namespace) -> Job:
    """Writes tokens and starting weights; gives the job."""
    import jax

    import jaxalign as ja

    work = arguments.work
    start = work / "start"
    if not start.exists():
        work.mkdir(parents=True, exist_ok=True)
        tok = ja.load_tokenizer(arguments.model)

        def encode(text: str) -> list[int]:
            return [*tok(text, add_special_tokens=False).input_ids, tok.eos_token_id]

        train, held_out = split(arguments.data, arguments.train, arguments.held_out, encode)
        save_pairs(work / "train.npz", train)
        save_pairs(work / "held_out.npz", held_out)
        model, params = ja.load_pretrained(arguments.model)
        scorer, params = ja.with_scalar_head(model, params, jax.random.key(0))
        ja.save_pretrained(scorer, params, start, tokenizer=tok)
    return Job(
        algorithm="reward",
        model=str(start),
        train=str(work / "train.npz"),
        held_out=str(work / "held_out.npz"),
        steps=arguments.train // PAIRS,
        pairs=PAIRS,
        length=LENGTH,
        peer_pairs=4,
        layout="packed",
        row_length=2 * LENGTH,
        row_group=1,
        learning_rate=arguments.rate,
        warmup_steps=arguments.warmup,
        checkpoint_every=10,
        threads=arguments.threads,
    )


def compare(work: pathlib.Path, job: Job, sides: dict[str, dict]) -> dict:
    """One row of results."""
    row = {"benchmark": "hh_reward", **machine(), "train": job.steps * job.pairs}
    row |= {"held_out": len(load_pairs(str(job.held_out)).chosen), "length": job.length}
    row |= {"learning_rate": job.learning_rate, "warmup_steps": job.warmup_steps}
    losses, scores = {}, {}
    for side, done in sides.items():
        steps = read_steps(work / side / "steps.jsonl")
        losses[side] = np.array([step["loss"] for step in steps])
        with np.load(work / side / "scores.npz") as file:
            scores[side] = (file["chosen"], file["rejected"])
        row[side] = accuracy(*scores[side]) | {
            "loss_first_10": round(float(losses[side][:10].mean()), 5),
            "loss_last_10": round(float(losses[side][-10:].mean()), 5),
            "seconds": round(sum(step["seconds"] for step in steps)),
            "peak_mib": done["peak_mib"],
            "versions": done["versions"],
        }
    if len(sides) == 2:
        ours, theirs = scores["ours"], scores["trl"]
        right = [np.asarray(c > r) for c, r in (ours, theirs)]
        row["difference"] = {
            "loss_max": float(f"{np.max(np.abs(losses['ours'] - losses['trl'])):.3g}"),
            "score_max": float(f"{np.max(np.abs(np.subtract(ours, theirs))):.3g}"),
            "only_ours_right": int(np.sum(right[0] & ~right[1])),
            "only_trl_right": int(np.sum(right[1] & ~right[0])),
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder, GGUF file or hub id")
    parser.add_argument("data", type=pathlib.Path, help="harmless-base-test.jsonl.gz")
    parser.add_argument("--peer", help="interpreter of TRL's environment; without it only ours")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--train", type=int, default=600, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=312, help="pairs held out")
    parser.add_argument("--rate", type=float, default=2e-5, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=5, help="updates of linear rise")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="a JSON line is appended here")
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    job = prepare(arguments)
    write_job(arguments.work, job)
    pythons = {"ours": sys.executable} | ({"trl": arguments.peer} if arguments.peer else {})
    sides = {
        side: carry_out(side, python, arguments.work, job.threads)
        for side, python in pythons.items()
    }
    row = compare(arguments.work, job, sides)
    print(json.dumps(row, indent=1))
    if arguments.out is not None:
        append(arguments.out, row)


if __name__ == "__main__":
    main()
