"""jaxalign's side of a job (see `_job.py`): python _ours.py FOLDER"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
from _job import Job, Pairs, append, load_pairs, peak_mib, read_job

import jaxalign as ja
from jaxalign import dpo, reward
from jaxalign.checkpoint import Checkpoints
from jaxalign.data.chat import Encoded
from jaxalign.data.packing import best_fit, token_rows


def pair_batch(pairs: Pairs, length: int, packed: bool, rows: int | None = None) -> ja.PairBatch:
    """Pairs as a batch of numpy arrays.

    Args:
      pairs: the pairs, each side at most `length` tokens.
      length: tokens of a row.
      packed: pairs share rows, best fit; else one a row.
      rows: how many rows; by default as many as the pairs need.
    """
    longer = [max(len(c), len(r)) for c, r in zip(pairs.chosen, pairs.rejected, strict=True)]
    groups = best_fit(longer, length) if packed else [[i] for i in range(len(longer))]
    rows = len(groups) if rows is None else rows

    def side(ids: list[np.ndarray]) -> ja.TokenBatch:
        documents = [
            Encoded(row, np.arange(len(row)) >= prompt)
            for row, prompt in zip(ids, pairs.prompts, strict=True)
        ]
        return token_rows(documents, groups, rows, length, 0)

    mask = None
    if packed:
        # As wide as if all pairs shared a row, so that it is of one shape in every batch.
        sizes = np.array([len(group) for group in groups] + [0] * (rows - len(groups)))
        mask = np.arange(len(longer))[None] < sizes[:, None]
    return ja.PairBatch(side(pairs.chosen), side(pairs.rejected), mask=mask)


class Steps:
    """The step of a job, compiled once for every number of rows that a batch may have."""

    def __init__(self, job: Job, model: Any, tx: Any, state: ja.TrainState):
        self._job, self._model, self._tx, self._state = job, model, tx, state
        self._compiled: dict[int, Any] = {}
        self._prepare = dpo.make_prepare(model) if job.algorithm == "dpo" else None

    def __call__(self, state: ja.TrainState, reference: Any, batch: ja.PairBatch):
        rows = batch.chosen.inputs.shape[0]
        if rows not in self._compiled:
            parts = rows // self._job.row_group if self._job.row_group else 1
            if self._job.algorithm == "reward":
                step = reward.make_step(self._model, self._tx, micro_batches=parts)
            else:
                config = dpo.Config(beta=self._job.beta)
                step = dpo.make_step(self._model, self._tx, config, micro_batches=parts)
            self._compiled[rows] = ja.compile_step(step, state)
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
        documents = [Encoded(row, np.ones(len(row), bool)) for row in ids]
        # Rows of at most job.pairs documents, four rows at a time.
        groups = best_fit([len(row) for row in ids], job.row_length)
        groups = [g[i : i + job.pairs] for g in groups for i in range(0, len(g), job.pairs)]
        for at in range(0, len(groups), 4):
            part = groups[at : at + 4]
            found = np.asarray(run(params, token_rows(documents, part, 4, job.row_length, 0)))
            for group, values in zip(part, found, strict=False):
                scores[group] = values[: len(group)]
        sides.append(scores)
    return sides[0], sides[1]


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    job, out = read_job(folder), folder / "ours"
    out.mkdir(exist_ok=True)
    model, params = ja.load_pretrained(job.model, mesh=ja.make_mesh(), compute_dtype="float32")
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
    for number, pairs in enumerate(job.batches(start), start + 1):
        batch = pair_batch(pairs, job.row_length, job.packed)
        state, metrics = steps(state, reference, batch)
        loss = float(metrics["loss"])
        now = time.perf_counter()
        row = {"step": number, "loss": loss, "seconds": round(now - ended, 4)}
        append(out / "steps.jsonl", row | {"tokens": pairs.tokens})
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
