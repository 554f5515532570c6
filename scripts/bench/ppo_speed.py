"""Speed of a whole PPO iteration against TRL's trainer, and of generation against transformers.

    PEER=$(bash scripts/bench/_peers.sh trl-1.12.0)     # of GRPO: trl-1.16.0, with --what grpo
    python scripts/bench/ppo_speed.py --peer $PEER --work FOLDER \
        --out docs/results/ppo_speed.jsonl

A random Llama (`--sizes S M`: vocabulary 8192, hidden 256, 4 layers; 32000, 512, 8 layers), 16
prompts of 64 tokens, float32. `ppo` (S): answers of 64 tokens, scored by a reward model of the same
shape, 4 epochs of updates of policy and critic; "full", or "ragged": every answer stops at a length
drawn uniformly from 4 to 64, at which both sides are told to end it (ours by `lengths=`, TRL's
`generate` by a logits processor), so that both write and learn the same number of tokens.
`grpo` (S): 8 prompts of 256 tokens with 8 answers each of up to 64, one update an iteration, KL in
the loss, a reward that costs nothing; ours packs rows whose answers share their prompt. `generate`:
128 new tokens by sampling. Peer and ours run in turn, each time in a fresh process. The
first pass over the drawn lengths, in which ours compiles, is left out; figures are medians of the
rest over all repeats. TRL 1.12 is the last with a PPOTrainer. It runs without gradient
checkpointing, and glibc keeps its memory (`_job.ALLOCATOR`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import statistics
import sys

import jax
from _job import append, carry_out, machine, read_steps, write_job
from _ppo import Rollouts, draw_lengths

SIDES = ("ppo_trl", "ppo_ours")


def make_job(arguments: argparse.Namespace, what: str, size: str, kind: str) -> Rollouts:
    """Writes the weights of one case and gives its job."""
    from _start import SIZES, random_llama, save_start

    folder = arguments.work.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    model, params = random_llama(size)
    policy = save_start("ppo", model, params, folder / f"policy-{size}")
    scorer = save_start("reward", model, params, folder / f"scorer-{size}") if what == "ppo" else ""
    new_tokens = 128 if what == "generate" else 64
    groups = {"prompts": 64, "samples": 8, "prompt_length": 256, "epochs": 1}
    shape = groups if what == "grpo" else {}
    prompts = shape.get("prompts", Rollouts.prompts)
    draws = arguments.draws if what != "generate" and kind == "ragged" else 1
    return Rollouts(
        what=what,
        policy=policy,
        scorer=scorer,
        vocab=SIZES[size][0],
        shape=SIZES[size],
        new_tokens=new_tokens,
        lengths=draw_lengths(kind, draws, prompts, new_tokens),
        passes=arguments.passes + 1,
        pack=arguments.pack if kind == "ragged" or what == "grpo" else 0,
        row_group=arguments.row_group,
        threads=arguments.threads,
        **shape,
    )


def pythons_of(arguments: argparse.Namespace, what: str) -> dict[str, str]:
    """Side → interpreter, ours last."""
    pythons = {SIDES[0]: arguments.peer}
    if what == "generate" and arguments.tunix is not None:
        pythons["ppo_tunix"] = arguments.tunix
    return pythons | {SIDES[1]: sys.executable}


def measure(
    arguments: argparse.Namespace, case: pathlib.Path, job: Rollouts
) -> dict[str, dict[str, list]]:
    """Runs both sides in turn, several times: the seconds of every measured step."""
    pythons = pythons_of(arguments, job.what)
    found: dict[str, dict[str, list]] = {side: {"seconds": [], "peak_mib": []} for side in pythons}
    for repeat in range(arguments.repeats):
        folder = case / f"repeat-{repeat}"
        write_job(folder, job)
        for side, python in pythons.items():
            done = carry_out(side, python, folder, job.threads, arguments.devices)
            steps = read_steps(folder / side / "steps.jsonl")[len(job.lengths) :]
            wrong = [s["step"] for s in steps if s["written"] != sum(job.steps[s["step"]])]
            if wrong:
                raise ValueError(f"{side} wrote answers of other lengths in steps {wrong}")
            found[side]["seconds"].append([step["seconds"] for step in steps])
            found[side]["peak_mib"].append(done["peak_mib"])
            found[side]["versions"] = done["versions"]
            if "prepare" in steps[0]:
                parts = found[side].setdefault("prepare_seconds", [])
                parts.append([step["prepare"] for step in steps])
    return found


def summary(found: dict[str, dict[str, list]], written: float) -> dict:
    """Medians, and ours against the fastest peer's."""
    median = {
        side: {
            "seconds": round(statistics.median(itertools.chain(*figures["seconds"])), 4),
            "peak_mib": statistics.median(figures["peak_mib"]),
        }
        for side, figures in found.items()
    }
    for figures in median.values():
        figures["new_tokens_a_second"] = round(written / figures["seconds"], 1)
    ours = median[SIDES[1]]
    peer = min((median[s] for s in median if s != SIDES[1]), key=lambda one: one["seconds"])
    ratio = {"speed_ratio": round(peer["seconds"] / ours["seconds"], 3)}
    return ratio | {"memory_ratio": round(ours["peak_mib"] / peer["peak_mib"], 3), "median": median}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="interpreter of TRL 1.12's environment")
    parser.add_argument("--tunix", help="interpreter of Tunix's, for generation")
    parser.add_argument("--work", type=pathlib.Path, required=True, help="folder to work in")
    parser.add_argument("--what", nargs="+", default=["ppo", "generate"])
    parser.add_argument("--sizes", nargs="+", default=["S", "M"], help="of generation; PPO is S")
    parser.add_argument("--kinds", nargs="+", default=["full", "ragged"], help="of PPO's answers")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--passes", type=int, default=2, help="measured, over the drawn lengths")
    parser.add_argument("--draws", type=int, default=2, help="of the lengths of ragged answers")
    parser.add_argument(
        "--pack", type=int, default=16, help="ours, ragged: sizes of packed batches"
    )
    parser.add_argument("--row-group", type=int, default=0, help="ours: rows computed at a time")
    parser.add_argument("--devices", type=int, default=1, help="ours: CPU devices")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="JSON lines are appended here")
    arguments = parser.parse_args()
    cases = [
        (what, "S", kind)
        for what in ("ppo", "grpo")
        for kind in arguments.kinds
        if what in arguments.what
    ]
    cases += [
        ("generate", size, "full") for size in arguments.sizes if "generate" in arguments.what
    ]
    # The weights are made here, and this process then only waits.
    jobs = [make_job(arguments, *case) for case in cases]
    jax.clear_caches()
    for (what, size, kind), job in zip(cases, jobs, strict=True):
        found = measure(arguments, arguments.work.absolute() / f"{what}-{size}-{kind}", job)
        written = sum(map(sum, job.lengths)) / len(job.lengths)
        row = {"benchmark": "ppo_speed", "what": what, "size": size, "answers": kind}
        row |= {**summary(found, written), "job": dataclasses.asdict(job), "repeats": found}
        row |= machine(pythons_of(arguments, what), arguments.threads)
        for name in ("policy", "scorer"):  # where they lay is of no interest
            del row["job"][name]
        print(json.dumps({k: v for k, v in row.items() if k not in ("job", "repeats")}))
        if arguments.out is not None:
            append(arguments.out, row)


if __name__ == "__main__":
    main()
