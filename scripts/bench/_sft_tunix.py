"""Tunix's side of `sft_speed.py`: PYTHON-OF-THE-PEER _sft_tunix.py FOLDER

The trainer's own compiled step, without its loop; rows are padded, since its SFT has no packing.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import time

import jax
import numpy as np
import optax
from _job import append, peak_mib
from _sft import LONGEST, ROWS, read_texts
from _tunix import random_llama
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig


def inputs_of(documents: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Padded rows, and who sees whom, as the trainer's loss takes them."""
    tokens = np.zeros((len(documents), LONGEST), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for row, ids in enumerate(documents):
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    causal = np.tril(np.ones((LONGEST, LONGEST), bool))
    positions = np.where(mask, np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    seen = causal[None] & mask[:, None, :]
    return {
        "input_tokens": tokens,
        "input_mask": mask,
        "positions": positions,
        "attention_mask": seen,
    }


def main() -> None:
    folder, side = pathlib.Path(sys.argv[1]), sys.argv[2]
    job, out = read_texts(folder), folder / side
    out.mkdir(exist_ok=True)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
    trainer = PeftTrainer(random_llama(job.shape), tx, TrainingConfig(eval_every_n_steps=10**9))
    step, _ = trainer.jit_train_and_eval_step()
    documents = job.documents()
    batches = len(documents) // ROWS
    ended = time.perf_counter()
    for number in range(batches * job.passes):
        at = number % batches * ROWS
        part = documents[at : at + ROWS]
        found = step(inputs_of(part))
        loss = float(jax.tree.leaves(found)[0])
        now, lengths = time.perf_counter(), [len(ids) for ids in part]
        row = {"step": number, "loss": loss, "seconds": round(now - ended, 4)}
        append(out / "steps.jsonl", row | {"tokens": sum(lengths), "lengths": lengths})
        ended = now
    names = ("google-tunix", "jax", "flax")
    done = {"peak_mib": round(peak_mib()), "batches": batches}
    done |= {"versions": {name: importlib.metadata.version(name) for name in names}}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
