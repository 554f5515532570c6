"""What safety costs: saves, checksums and the numeric guard, beside steps of SFT without them.

    python scripts/faults/costs.py [--size S] [--rounds 5] [--steps 20] [--out FILE.json]

One process, random weights and rows. A round times `--steps` steps two ways in turn: as they are,
and with one save (in the background, as a run saves) at their beginning, which must be on disk
before the time is taken. Medians over the rounds, and their range. Of the save also the seconds in
which the loop waits, and those of hashing; and of a load, those of checking.

The guard costs less than one step differs from the next. So steps with and without it take turns,
2 `--steps` pairs a round, and processor seconds count: the median of the pairs' differences.

Run it where nothing else runs: the figures are differences of times.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]

import jax  # noqa: E402
import optax  # noqa: E402
from _job import machine  # noqa: E402

from jaxalign.algorithms import guard, step  # noqa: E402
from jaxalign.commands.bench.case import Case  # noqa: E402
from jaxalign.commands.bench.random import RandomLoader  # noqa: E402
from jaxalign.commands.bench.rows import RandomBatches  # noqa: E402
from jaxalign.hf import checksums  # noqa: E402
from jaxalign.run.checkpoint import Checkpoints  # noqa: E402
from jaxalign.run.tasks import ALGORITHMS  # noqa: E402
from jaxalign.run.tasks.parts import RunData  # noqa: E402


def main() -> int:
    """Measures; see the top."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="S", help="as of `jaxalign bench`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="between two saves")
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        result = measure(options.size, options.rounds, options.steps, pathlib.Path(place))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "orbax-checkpoint")}
    result |= machine() | versions
    print(json.dumps(result, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(size: str, rounds: int, steps: int, place: pathlib.Path) -> dict[str, Any]:
    """Seconds of each way, and the costs in percent."""
    guarded, state, batch = make_step(size)
    plain, _, _ = make_step(size, plain_update)
    state, _ = advance(guarded, state, batch, 2)
    state, _ = advance(plain, state, batch, 2)
    seconds: dict[str, list[float]] = {"guarded": [], "saving": []}
    parts: dict[str, list[float]] = {
        "save_blocks": [],
        "save": [],
        "hash": [],
        "load": [],
        "check": [],
    }
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        for way in ("guarded", "saving") if number % 2 else ("saving", "guarded"):
            if way == "saving":
                state, took = steps_with_save(guarded, state, batch, steps, place, parts)
            else:
                state, took = advance(guarded, state, batch, steps)
            seconds[way].append(took)
        for pair in range(2 * steps):
            work = {}
            for train_step in (guarded, plain) if pair % 2 else (plain, guarded):
                began = time.process_time()
                state, _ = advance(train_step, state, batch, 1)
                work[train_step] = time.process_time() - began
            pairs.append((work[guarded], work[plain]))
    middle = {way: statistics.median(values) for way, values in (seconds | parts).items()}
    spread = {
        way: [round(f(values), 3) for f in (min, max)] for way, values in (seconds | parts).items()
    }

    def percent(of: float, base: float) -> float:
        return round(100 * of / base, 2)

    return {
        "what": f"SFT, size {size}, {rounds} rounds of {steps} steps",
        "seconds": {way: round(value, 3) for way, value in middle.items()},
        "seconds_from_to": spread,
        "save_percent_of_steps": percent(middle["saving"] - middle["guarded"], middle["guarded"]),
        "guard_percent_of_step": percent(
            statistics.median(a - b for a, b in pairs), statistics.median(b for _, b in pairs)
        ),
        "guard_pairs": len(pairs),
        "processor_seconds_of_a_step": [
            round(statistics.median(side), 3) for side in zip(*pairs, strict=True)
        ],
        "hash_percent_of_save": percent(middle["hash"], middle["save"]),
        "check_percent_of_load": percent(middle["check"], middle["load"]),
    }


def make_step(size: str, update: Callable[..., Any] = guard.guarded_update) -> tuple[Any, Any, Any]:
    """A compiled step, a state and a batch; `update` takes the guard's place."""
    step.guarded_update = update
    case = Case(what="sft", size=size).resolved()
    mesh, algorithm = case.mesh(), ALGORITHMS["sft"]
    config = case.config(mesh)
    batches = RandomBatches(case, algorithm.shapes(config))
    data = RunData(10**6, batches=batches)  # pyrefly: ignore[bad-argument-type]
    state, parts = algorithm.build(config, mesh, RandomLoader(), data)
    task = algorithm.task(config, mesh, state, parts, data)
    return task.step, task.state, next(iter(task.batches))


def plain_update(
    tx: optax.GradientTransformation, state: Any, grads: Any, loss: Any, norm: Any
) -> guard.Guarded:
    """The update without any check."""
    updates, moments = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return guard.Guarded(
        state._replace(step=state.step + 1, params=params, opt_state=moments), 0.0 * loss
    )


def advance(train_step: Any, state: Any, batch: Any, steps: int) -> tuple[Any, float]:
    """Some steps; the seconds they took."""
    began = time.perf_counter()
    for _ in range(steps):
        state, metrics = train_step(state, batch)
    jax.block_until_ready((state, metrics))
    return state, time.perf_counter() - began


def steps_with_save(
    train_step: Any, state: Any, batch: Any, steps: int, place: pathlib.Path, parts: Any
) -> tuple[Any, float]:
    """A save and some steps, until both are done; then the checkpoint is loaded."""
    folder = place / "checkpoints"
    with saving(folder) as store:
        began = time.perf_counter()
        store.save(1, state, {})
        parts["save_blocks"].append(time.perf_counter() - began)
        state, _ = advance(train_step, state, batch, steps)
        store.finish(1, state, {})
        took = time.perf_counter() - began
    with saving(folder) as store, timed("write") as hashed:  # alone, for the share of hashing
        began = time.perf_counter()
        store.save(1, state, {})
        store.finish(1, state, {})
        parts["save"].append(time.perf_counter() - began)
        parts["hash"].append(sum(hashed))
        with timed("check") as checked:
            began = time.perf_counter()
            jax.block_until_ready(store.restore(state, 1)[0])
            parts["load"].append(time.perf_counter() - began)
            parts["check"].append(sum(checked))
    return state, took


@contextlib.contextmanager
def saving(folder: pathlib.Path) -> Iterator[Checkpoints]:
    """An empty store."""
    shutil.rmtree(folder, ignore_errors=True)
    store = Checkpoints(folder)
    yield store
    store.close()


@contextlib.contextmanager
def timed(name: str) -> Iterator[list[float]]:
    """The seconds of each call of a function of `checksums` within the block."""
    seconds: list[float] = []
    inner = getattr(checksums, name)

    def call(*arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return inner(*arguments)
        finally:
            seconds.append(time.perf_counter() - began)

    with mock.patch.object(checksums, name, call):
        yield seconds


if __name__ == "__main__":
    sys.exit(main())
