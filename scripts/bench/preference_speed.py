"""Speed and memory of the DPO and reward steps against TRL: full and ragged rows, in one run.

    PEER=$(bash scripts/bench/_peers.sh trl-1.16.0)
    python scripts/bench/preference_speed.py --peer $PEER --work FOLDER \
        --out docs/results/preference_speed.jsonl

A random Llama (`--size S`: vocabulary 8192, hidden 256, 4 layers; M: 32000, 512, 8 layers), 8 pairs
a step, float32, AdamW. Full: every side has 256 tokens. Ragged: the lengths of both sides are drawn
uniformly from 32 to 256; TRL pads the 8 pairs of a step as its collator does, ours packs all pairs
together and makes as many steps of them. The first quarter of the shorter side is a prompt that
both sides share; `--shared` lets ours hold it once. DPO computes the reference in every step on
both sides. Peer and ours run in turn, each time in a fresh process; figures are
medians over the repeats. Speed counts real tokens of both sides; the steps of the first pass over
the batches, in which ours compiles, are left out. Memory is the peak of the resident set of the
process. TRL runs without gradient checkpointing, and glibc keeps its memory (`_job.ALLOCATOR`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys

import numpy as np
from _job import Job, Pairs, append, carry_out, machine, read_steps, save_pairs, write_job

LENGTH, SHORTEST, PAIRS, BATCHES = 256, 32, 8, 4
ROW_LENGTH = {"side by side": 400, "shared": 576}
"""Ours, ragged: of the row lengths tried, those that leave the least room for these draws."""


def draw(kind: str, count: int, vocab: int, prompt_share: float, seed: int = 0) -> Pairs:
    """Random pairs that share a prompt.

    Args:
      kind: "full" or "ragged".
      count: how many.
      vocab: ids are drawn from 2 to this.
      prompt_share: part of the shorter side that is the prompt.
      seed: of the draw.
    """
    rng = np.random.default_rng(seed)
    shortest = LENGTH if kind == "full" else SHORTEST
    lengths = rng.integers(shortest, LENGTH + 1, (count, 2))
    prompts = np.maximum(1, lengths.min(1) * prompt_share).astype(np.int32)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for pair, start in zip(lengths, prompts, strict=True):
        prompt = rng.integers(2, vocab, start)
        for side, length in zip(sides, pair, strict=True):
            answer = rng.integers(2, vocab, length - start)
            side.append(np.concatenate([prompt, answer]).astype(np.int32))
    return Pairs(*sides, prompts)


def speed(steps: list[dict], warm: int) -> float:
    """Real tokens a second over all steps but the first `warm`."""
    kept = steps[warm:]
    return sum(step["tokens"] for step in kept) / sum(step["seconds"] for step in kept)


def prepare(arguments: argparse.Namespace, algorithm: str, kind: str) -> tuple[pathlib.Path, Job]:
    """Writes weights and tokens of one case; gives its folder and job."""
    from _start import SIZES, random_llama, save_start

    case = arguments.work.absolute() / "-".join(
        [arguments.size, algorithm, kind] + ["shared"] * arguments.shared
    )
    case.mkdir(parents=True, exist_ok=True)
    start = save_start(algorithm, *random_llama(arguments.size), case / "start")
    pairs = draw(kind, BATCHES * PAIRS, SIZES[arguments.size][0], arguments.prompt_share)
    save_pairs(case / "train.npz", pairs)
    row_length = ROW_LENGTH["shared" if arguments.shared else "side by side"]
    if kind == "full":
        row_length = LENGTH
    if kind == "full" and arguments.shared:
        row_length = -(-(2 * LENGTH - int(pairs.prompts[0]) + 1) // 8) * 8
    return case, Job(
        algorithm=algorithm,
        model=start,
        train=str(case / "train.npz"),
        steps=BATCHES * (1 + arguments.passes),
        pairs=PAIRS,
        length=LENGTH,
        peer_pairs=PAIRS,
        layout="pooled" if kind == "ragged" else "rows",
        shared=arguments.shared,
        row_length=row_length,
        row_group=arguments.row_group,
        learning_rate=1e-6,
        warmup_steps=1,
        threads=arguments.threads,
    )


def measure(
    arguments: argparse.Namespace, case: pathlib.Path, job: Job
) -> dict[str, dict[str, list]]:
    """Runs both sides in turn, several times."""
    pythons = {"trl": arguments.peer, "ours": sys.executable}
    found: dict[str, dict[str, list]] = {
        side: {"tokens_a_second": [], "peak_mib": [], "loaded_mib": []} for side in pythons
    }
    for repeat in range(arguments.repeats):
        folder = case / f"repeat-{repeat}"
        write_job(folder, job)
        for side, python in pythons.items():
            done = carry_out(side, python, folder, job.threads)
            steps = read_steps(folder / side / "steps.jsonl")
            found[side]["tokens_a_second"].append(round(speed(steps, BATCHES), 1))
            for name in ("peak_mib", "loaded_mib"):
                found[side][name].append(done[name])
            found[side]["versions"] = done["versions"]
    return found


def summary(found: dict[str, dict[str, list]]) -> dict:
    """Medians, and ours against the peer's."""
    median = {
        side: {k: statistics.median(v) for k, v in figures.items() if k != "versions"}
        for side, figures in found.items()
    }
    ours, peer = median["ours"], median["trl"]
    return {
        "speed_ratio": round(ours["tokens_a_second"] / peer["tokens_a_second"], 3),
        "memory_ratio": round(ours["peak_mib"] / peer["peak_mib"], 3),
        "median": median,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="interpreter of TRL's environment")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--row-group", type=int, default=0, help="ours: rows computed at a time")
    parser.add_argument("--size", choices=("S", "M"), default="S")
    parser.add_argument("--algorithms", nargs="+", default=["dpo", "reward"])
    parser.add_argument("--kinds", nargs="+", default=["full", "ragged"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help=f"over {BATCHES} batches, measured")
    parser.add_argument("--prompt-share", type=float, default=0.25)
    parser.add_argument("--shared", action="store_true", help="ours: prompts once, in one row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    for algorithm in arguments.algorithms:
        for kind in arguments.kinds:
            case, job = prepare(arguments, algorithm, kind)
            found = measure(arguments, case, job)
            row = {"benchmark": "preference_speed", "size": arguments.size, "algorithm": algorithm}
            row |= {"rows": kind, **summary(found), "prompt_share": arguments.prompt_share}
            row |= {"job": dataclasses.asdict(job), "repeats": found}
            row |= machine({"trl": arguments.peer, "ours": sys.executable}, arguments.threads)
            for name in ("model", "train"):  # where they lay is of no interest
                del row["job"][name]
            print(json.dumps({k: v for k, v in row.items() if k not in ("job", "repeats")}))
            if arguments.out is not None:
                append(arguments.out, row)


if __name__ == "__main__":
    main()
