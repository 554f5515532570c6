"""jaxalign's side of `sft_speed.py`: python _sft_ours.py FOLDER"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import time

import numpy as np
from _job import append, peak_mib
from _sft import LONGEST, ROWS, Texts, read_texts

import jaxalign as ja
from jaxalign import sft
from jaxalign.commands.bench.case import cached_rows, row_parts
from jaxalign.commands.bench.machine import matmul_rate
from jaxalign.commands.startup.freed_memory import return_freed_memory
from jaxalign.data.chat import Encoded
from jaxalign.data.packing import best_fit, token_rows


def batches(job: Texts) -> list[list[list[int]]]:
    """Which documents stand in each row of each batch."""
    lengths = [len(ids) for ids in job.documents()]
    if job.kind == "full":
        groups = [[i] for i in range(len(lengths))]
        return [groups[at : at + ROWS] for at in range(0, len(groups), ROWS)]
    rows = ROWS * LONGEST // job.row_length
    groups = best_fit(lengths, job.row_length)
    groups += [[]] * (-len(groups) % rows)  # the last batch may have empty rows
    return [groups[at : at + rows] for at in range(0, len(groups), rows)]


def main() -> None:
    return_freed_memory()  # as the `jaxalign` command does
    folder = pathlib.Path(sys.argv[1])
    job, out = read_texts(folder), folder / sys.argv[2]
    out.mkdir(exist_ok=True)
    mesh = ja.make_mesh(data=-1, fsdp=1)
    model, params = ja.load_pretrained(job.model, mesh=mesh, compute_dtype="float32")
    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-6))
    state = ja.init_state(params, tx)
    del params
    documents = [Encoded(ids, np.ones(len(ids), bool)) for ids in job.documents()]
    plan = batches(job)
    rows = len(plan[0])
    length = LONGEST if job.kind == "full" else job.row_length
    parts = row_parts(rows, job.row_group or cached_rows(length), mesh.size)
    step = ja.compile_step(sft.make_step(model, tx, micro_batches=parts), state, mesh)
    ended = time.perf_counter()
    for number in range(len(plan) * job.passes):
        groups = plan[number % len(plan)]
        state, metrics = step(state, token_rows(documents, groups, rows, length, 0))
        loss = float(metrics["loss"])
        now = time.perf_counter()
        lengths = [len(documents[i].ids) for group in groups for i in group]
        row = {"step": number, "loss": loss, "seconds": round(now - ended, 4)}
        append(out / "steps.jsonl", row | {"tokens": sum(lengths), "lengths": lengths})
        ended = now
    peak = peak_mib()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    done = {"peak_mib": round(peak), "versions": versions, "compiles": step.compiles}
    done |= {"batches": len(plan), "matmul_flops": matmul_rate(mesh, "float32")}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
