"""jaxalign's side of a job (see `_job.py`): python _ours.py FOLDER"""

from __future__ import annotations

import importlib.metadata
import json
import math
import pathlib
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from _job import Job, Pairs, append, load_pairs, peak_mib, read_job

import jaxalign as ja
from jaxalign import dpo, reward
from jaxalign.commands.bench.case import cached_rows, row_parts
from jaxalign.commands.startup.freed_memory import return_freed_memory
from jaxalign.data.branches import shared_rows, shared_size
from jaxalign.data.chat import Encoded
from jaxalign.data.packing import best_fit, token_rows
from jaxalign.parallel.sharding import shard_batch
from jaxalign.run.checkpoint import Checkpoints


class Update(NamedTuple):
    """Which pairs an update takes, and how they lie in rows.

    Attributes:
      pairs: to choose from.
      groups: the pairs of each row.
      rows: how many rows the batch has; those beyond the groups stay empty.
      slots: the most pairs that any row may hold.
    """

    pairs: Pairs
    groups: list[list[int]]
    rows: int
    slots: int

    @property
    def tokens(self) -> int:
        """Tokens of its pairs, both sides."""
        which = [pair for group in self.groups for pair in group]
        return sum(len(self.pairs.chosen[i]) + len(self.pairs.rejected[i]) for i in which)


def documents(pairs: Pairs) -> list[list[Encoded]]:
    """Both sides of all pairs; what follows the prompt is trained."""
    return [
        [
            Encoded(ids, np.arange(len(ids)) >= prompt)
            for ids, prompt in zip(side, pairs.prompts, strict=True)
        ]
        for side in (pairs.chosen, pairs.rejected)
    ]


def updates(job: Job) -> list[Update]:
    """The updates of one pass over the data."""

    def groups(pairs: Pairs) -> list[list[int]]:
        if job.layout == "rows":
            return [[i] for i in range(len(pairs.chosen))]
        both = zip(*documents(pairs), strict=True)
        size = shared_size if job.shared else lambda c, r: max(len(c.ids), len(r.ids))
        return best_fit([size(c, r) for c, r in both], job.row_length)

    parts = job.updates()
    if job.layout != "pooled":
        laid = [groups(pairs) for pairs in parts]
        # Room for all pairs in one row, so that batches of as many rows have one shape.
        slots = 1 if job.layout == "rows" else job.pairs
        return [Update(pairs, g, len(g), slots) for pairs, g in zip(parts, laid, strict=True)]
    pairs = load_pairs(job.train).take(0, len(parts) * job.pairs)
    laid = groups(pairs)
    rows = math.ceil(len(laid) / len(parts) / job.threads) * job.threads
    slots = max(map(len, laid))
    return [Update(pairs, laid[at : at + rows], rows, slots) for at in range(0, len(laid), rows)]


def make_batch(update: Update, job: Job) -> ja.PairBatch | ja.SharedPairBatch:
    """The numpy batch of an update."""
    sides = documents(update.pairs)
    sizes = np.array([len(g) for g in update.groups] + [0] * (update.rows - len(update.groups)))
    mask = np.arange(update.slots)[None] < sizes[:, None]
    layout = (update.groups, update.rows, job.row_length, 0)
    if job.shared:
        return ja.SharedPairBatch(shared_rows(*sides, *layout), mask=mask)
    chosen, rejected = (token_rows(side, *layout) for side in sides)
    return ja.PairBatch(chosen, rejected, mask=None if job.layout == "rows" else mask)


class Steps:
    """The step of a job, compiled once for every number of rows that a batch may have."""

    def __init__(self, job: Job, model: Any, tx: Any, state: ja.TrainState):
        self._job, self._model, self._tx, self._state = job, model, tx, state
        self._compiled: dict[int, Any] = {}
        self._prepare = dpo.make_prepare(model) if job.algorithm == "dpo" else None

    def __call__(self, state: ja.TrainState, reference: Any, batch: Any):
        rows, length = jax.tree.leaves(batch)[0].shape[:2]
        if rows not in self._compiled:
            sides = 1 if self._job.shared else 2
            group = self._job.row_group or cached_rows(sides * length)
            parts = row_parts(rows, group, jax.device_count())
            if self._job.algorithm == "reward":
                step = reward.make_step(self._model, self._tx, micro_batches=parts)
            else:
                config = dpo.Config(beta=self._job.beta)
                step = dpo.make_step(self._model, self._tx, config, micro_batches=parts)
            self._compiled[rows] = ja.compile_step(step, state)
        batch = shard_batch(batch, self._compiled[rows].mesh)
        if self._prepare is not None:
            batch = self._prepare(reference, batch)
        return self._compiled[rows](state, batch)

    @property
    def compiles(self) -> int:
        return sum(step.compiles for step in self._compiled.values())


def score(job: Job, scorer: Any, params: Any, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both answers of every pair, in packed batches of one shape."""

    @jax.jit
    def run(params: Any, tokens: ja.TokenBatch) -> jax.Array:
        return ja.pooled_scores(scorer, params, tokens, job.pairs)

    sides = []
    for ids in (pairs.chosen, pairs.rejected):
        scores = np.empty(len(ids), np.float32)
        texts = [Encoded(row, np.ones(len(row), bool)) for row in ids]
        # Rows of at most job.pairs documents, four rows at a time.
        groups = best_fit([len(row) for row in ids], job.row_length)
        groups = [g[i : i + job.pairs] for g in groups for i in range(0, len(g), job.pairs)]
        for at in range(0, len(groups), 4):
            part = groups[at : at + 4]
            found = np.asarray(run(params, token_rows(texts, part, 4, job.row_length, 0)))
            for group, values in zip(part, found, strict=False):
                scores[group] = values[: len(group)]
        sides.append(scores)
    return sides[0], sides[1]


def main() -> None:
    return_freed_memory()  # as the `jaxalign` command does
    folder = pathlib.Path(sys.argv[1])
    job, out = read_job(folder), folder / "ours"
    out.mkdir(exist_ok=True)
    mesh = ja.make_mesh(data=-1, fsdp=1)
    model, params = ja.load_pretrained(job.model, mesh=mesh, compute_dtype="float32")
    tx = ja.make_optimizer(
        ja.OptimizerConfig(
            learning_rate=job.learning_rate,
            schedule="linear",
            warmup_steps=job.warmup_steps,
            total_steps=job.steps,
        )
    )
    state = ja.init_state(params, tx)
    store = Checkpoints(out / "checkpoints", keep=1) if job.checkpoint_every else None
    if store is not None and store.latest is not None:
        state, _ = store.restore(state)
    reference = params if job.algorithm == "dpo" else None
    del params
    steps = Steps(job, model, tx, state)
    start = int(state.step)
    loaded_peak = peak_mib()
    ended = time.perf_counter()
    plan = updates(job)
    for number in range(start + 1, job.steps + 1):
        update = plan[(number - 1) % len(plan)]
        batch = make_batch(update, job)
        state, metrics = steps(state, reference, batch)
        loss = float(metrics["loss"])
        now = time.perf_counter()
        row = {"step": number, "loss": loss, "seconds": round(now - ended, 4)}
        append(out / "steps.jsonl", row | {"tokens": update.tokens})
        ended = now
        if store is not None and number % job.checkpoint_every == 0:
            store.save(number, state, {})
    if store is not None:
        store.close()
    training_peak = peak_mib()
    if job.held_out is not None:
        chosen, rejected = score(job, model, state.params, load_pairs(job.held_out))
        np.savez(out / "scores.npz", chosen=chosen, rejected=rejected)
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    done = {"peak_mib": round(training_peak), "loaded_mib": round(loaded_peak)}
    done |= {"compiles": steps.compiles, "versions": versions}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
