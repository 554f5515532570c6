"""Kills runs at random moments, resumes them, and compares with runs that nobody killed.

    nice -n 15 python scripts/faults/kills.py [--kills 200] [--seed 0] [--only ppo] [--out FILE]

Kinds of run: SFT, reward model, DPO, KTO, PPO, GRPO, a pipeline, the quickstart, synthesis; tiny
models on one CPU device. Each trial starts one, sends SIGKILL at its moment, and resumes it to its
end with `run.resume=auto`. Then metrics (all but `time/`), exported weights, dumps,
`evaluation.json` and the saved position of the loop must be those of the uninterrupted run, bit for
bit.

- `early`: within the first second of the command.
- `any`: at any time of an uninterrupted run.
- `line`: just after a line of `metrics.jsonl`.
- `save`: within a save of a checkpoint.
- `last`: after the last step: the evaluation, the save, the export.
- `export`: while the weights are written.
- `twice`: at any time, and the resumed run in its first second, or at any time, again.
- `fresh`: a fresh interpreter, imports included, instead of a fork in which these are done.

The quickstart refuses a folder that holds something, so it cannot resume. Of it: the killed folder
stays as it is under the same command, the stages that had ended are bit-equal, and the same command
in a new folder gives the same.

Results are written as they come. With `--out`, a file of the same seed is continued. Exits with
status 1 if any trial differs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import json
import pathlib
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _runs
from _kinds import Reference, all_lines, synth_server
from _runs import Child, Compared, Ended

SHARES = {
    "sft": 28, "reward": 26, "dpo": 26, "kto": 26, "ppo": 28, "grpo": 26,
    "pipeline": 16, "synth": 18, "quickstart": 6,
}  # fmt: skip
"""Of 200 kills."""

MOMENTS = ("save", "any", "early", "line", "last", "export", "save", "twice", "any", "fresh")
_EARLY, _LAST, _WITHIN_SAVE, _WITHIN_EXPORT = 1.0, 0.5, 0.06, 0.03  # seconds
_POLL = 0.002
_TRIES = 6


def main() -> int:
    """Runs all of it; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(SHARES))
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, help="folder for the runs; default: temporary")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        place = options.work
        if place is None:
            place = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(parents=True, exist_ok=True)
        _runs.prepare_environment(place)
        stack.enter_context(synth_server(place))
        return run_trials(place, options)


def plan(kills: int, seed: int) -> list[dict[str, Any]]:
    """The trials, in an order in which every kind comes early."""
    trials: list[tuple[float, str, str]] = []
    for kind, share in SHARES.items():
        count = max(1, round(kills * share / sum(SHARES.values())))
        start = list(SHARES).index(kind)
        for number in range(count):
            moment = MOMENTS[(start + number) % len(MOMENTS)]
            if kind in ("synth", "quickstart"):
                moment = ("any", "early", "line")[number % 3]
            trials.append(((number + 0.5) / count, kind, moment))
    return [
        {"number": number, "kind": kind, "moment": moment, "seed": seed * 100_000 + number}
        for number, (_, kind, moment) in enumerate(sorted(trials))
    ]


def run_trials(place: pathlib.Path, options: argparse.Namespace) -> int:
    """Runs those trials that the file does not have yet."""
    done: dict[int, dict[str, Any]] = {}
    if options.out is not None and options.out.exists():
        old = json.loads(options.out.read_text())
        if old["seed"] == options.seed and old["planned"] == options.kills:
            done = {trial["number"]: trial for trial in old["trials"]}
    models = _runs.make_models(place)
    references: dict[str, Reference] = {}
    for trial in plan(options.kills, options.seed):
        if trial["number"] in done or options.only not in (None, trial["kind"]):
            continue
        kind = trial["kind"]
        if kind not in references:
            references[kind] = Reference(kind, place, models)
        done[trial["number"]] = run_trial(trial, references[kind], place)
        report(options, list(done.values()))
        print(json.dumps(done[trial["number"]]), flush=True)
    return int(any(not trial["equal"] for trial in done.values()))


def report(options: argparse.Namespace, trials: list[dict[str, Any]]) -> None:
    """Writes the file: counts by kind, then every trial."""
    if options.out is None:
        return
    trials = sorted(trials, key=lambda trial: trial["number"])
    table: dict[str, collections.Counter] = {}
    for trial in trials:
        row = table.setdefault(trial["kind"], collections.Counter())
        row.update(
            trials=1,
            kills=len(trial["kills"]),
            equal=int(trial["equal"]),
            lost=len(trial["lost"]),
            doubled=len(trial["doubled"]),
        )
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    head = {
        "python": platform.python_version(),
        **versions,
        "seed": options.seed,
        "planned": options.kills,
        "kills": sum(row["kills"] for row in table.values()),
        "trials_equal": sum(row["equal"] for row in table.values()),
        "by_kind": {kind: dict(row) for kind, row in table.items()},
    }
    _runs.write_json(options.out, head, "trials", trials)


# ------------------------------------------------------------------------- a trial


def run_trial(trial: dict[str, Any], reference: Reference, place: pathlib.Path) -> dict[str, Any]:
    """Kills a run, resumes it, compares; gives the trial with what came of it."""
    rng = random.Random(trial["seed"])
    base = place / f"trial-{trial['number']}"
    folder = base / "run"
    kills: list[dict[str, Any]] = []
    for _ in range(_TRIES):
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir()
        kills = kill_run(trial["moment"], reference, folder, rng)
        if kills:
            break
    if reference.kind == "quickstart":
        compared, ended = quickstart_again(reference, folder)
    else:
        ended = reference.start(folder, resume=True).wait()
        compared = reference.compare(folder) if ended.status == 0 else Compared([], [], [])
    equal = bool(kills) and ended.status == 0 and compared.equal and "Traceback" not in ended.log
    result = trial | {
        "kills": kills,
        "status": ended.status,
        "equal": equal,
        "lost": compared.lost,
        "doubled": compared.doubled,
        "different": compared.different,
    }
    if not equal:
        result["log"] = ended.log[-1500:]
    if equal:
        shutil.rmtree(base)
    return result


def kill_run(
    moment: str, reference: Reference, folder: pathlib.Path, rng: random.Random
) -> list[dict[str, Any]]:
    """Starts a run and kills it; what was there then. Empty if it ended before."""
    if moment == "fresh":
        first = kill_fresh(reference, folder, rng)
        return [] if first is None else [first]
    child = reference.start(folder)
    first = kill_at("any" if moment == "twice" else moment, child, reference, folder, rng)
    if first is None:
        return []
    if moment != "twice":
        return [first]
    child = reference.start(folder, resume=True)
    second = kill_at(rng.choice(("early", "any")), child, reference, folder, rng)
    return [first] if second is None else [first, second]


def kill_at(
    moment: str, child: Child, reference: Reference, folder: pathlib.Path, rng: random.Random
) -> dict[str, Any] | None:
    """Waits for the moment and kills; None if the run ended before."""
    delay, ready = MOMENT_RULES[moment](reference, folder, rng)
    while child.poll() is None and not ready():
        time.sleep(_POLL)
    end = time.monotonic() + delay
    while child.poll() is None and time.monotonic() < end:
        time.sleep(min(_POLL, max(0.0, end - time.monotonic())))
    seconds = child.seconds
    child.kill()
    if child.wait().status != -signal.SIGKILL:
        return None
    return {"moment": moment, "seconds": round(seconds, 3)} | left_behind(folder)


def left_behind(folder: pathlib.Path) -> dict[str, Any]:
    """What a killed run had done."""
    patterns = ("checkpoints/*", "*/checkpoints/*")
    found = [path for pattern in patterns for path in folder.glob(pattern)]
    return {
        "lines": sum(1 for _ in all_lines(folder)),
        "checkpoints": sum(path.name.isdecimal() for path in found),
        "unfinished": sum("tmp" in path.name for path in found),
    }


Rule = Callable[
    [Reference, pathlib.Path, random.Random], tuple[float, Callable[[], bool]]
]  # → (seconds after the event, whether the event is there)


def _at_once() -> bool:
    return True


def _early(reference: Reference, folder: pathlib.Path, rng: random.Random) -> Any:
    return rng.uniform(0, _EARLY), _at_once


def _any(reference: Reference, folder: pathlib.Path, rng: random.Random) -> Any:
    return rng.uniform(0, reference.seconds), _at_once


def _line(reference: Reference, folder: pathlib.Path, rng: random.Random) -> Any:
    wanted = rng.randint(1, max(1, reference.lines - 1))
    return rng.uniform(0, 0.005), lambda: sum(1 for _ in all_lines(folder)) >= wanted


def _save(reference: Reference, folder: pathlib.Path, rng: random.Random) -> Any:
    wanted, seen = rng.randint(1, 3), set()

    def ready() -> bool:
        for pattern in ("checkpoints/*.orbax*", "*/checkpoints/*.orbax*"):
            seen.update(str(path) for path in folder.glob(pattern))
        return len(seen) >= wanted

    return rng.uniform(0, _WITHIN_SAVE), ready


def _last(reference: Reference, folder: pathlib.Path, rng: random.Random) -> Any:
    def ready() -> bool:
        return sum(1 for _ in all_lines(folder)) >= reference.lines - 1

    return rng.uniform(0, _LAST), ready


def _export(reference: Reference, folder: pathlib.Path, rng: random.Random) -> Any:
    def ready() -> bool:
        patterns = (".model.*", "*/.model.*", "model")
        return any(path for pattern in patterns for path in folder.glob(pattern))

    return rng.uniform(0, _WITHIN_EXPORT), ready


MOMENT_RULES: dict[str, Rule] = {
    "early": _early, "any": _any, "line": _line, "save": _save, "last": _last, "export": _export,
}  # fmt: skip


def kill_fresh(
    reference: Reference, folder: pathlib.Path, rng: random.Random
) -> dict[str, Any] | None:
    """Kills a fresh interpreter, imports included."""
    log = folder.parent / f"{folder.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxalign", *reference.arguments(folder)],
            stdout=file,
            stderr=file,
        )
        began = time.monotonic()
        delay = rng.uniform(0, 2 * reference.seconds + 4)
        while process.poll() is None and time.monotonic() - began < delay:
            time.sleep(0.01)
        seconds = time.monotonic() - began
        process.kill()
        if process.wait() != -signal.SIGKILL:
            return None
    return {"moment": "fresh", "seconds": round(seconds, 3)} | left_behind(folder)


def quickstart_again(reference: Reference, folder: pathlib.Path) -> tuple[Compared, Ended]:
    """The quickstart after a kill; see the top."""
    before = snapshot(folder)
    refused = reference.start(folder).wait()
    different: list[str] = []
    if before and (refused.status != 2 or snapshot(folder) != before):
        different.append(f"the killed folder was not left alone (status {refused.status})")
    ended_stages = [path.parent for path in folder.glob("*/model")]
    fresh = folder.with_name("again")
    ended = reference.start(fresh).wait()
    compared = reference.compare(fresh) if ended.status == 0 else Compared([], [], [])
    for stage in ended_stages:
        if before and stage.name != "lower":
            found = _runs.compare(stage, reference.folder / stage.name)
            different += [f"ended stage {stage.name}: {what}" for part in found for what in part]
    return Compared(compared.lost, compared.doubled, [*compared.different, *different]), ended


def snapshot(folder: pathlib.Path) -> dict[str, bytes]:
    """The contents of all files of a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


if __name__ == "__main__":
    sys.exit(main())
