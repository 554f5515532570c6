"""TRL's side of `sft_speed.py`: PYTHON-OF-THE-PEER _sft_trl.py FOLDER trl_padded|trl_bfd

Packed, TRL lays the rows of a step end to end without padding ("padding-free"), and transformers
keeps the documents apart by their positions.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import time

import torch
from _job import append, peak_mib
from _sft import LONGEST, ROWS, read_texts
from _trl import tokenizer
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Recorder(TrainerCallback):
    """Writes time, loss and real tokens of every step as it ends."""

    def __init__(self, path: pathlib.Path):
        self._path, self.lengths = path, []

    def on_train_begin(self, args, state, control, **kwargs):
        self._ended = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now, lengths = time.perf_counter(), self.lengths[state.global_step - 1]
        row = {"step": state.global_step, "loss": float(logs["loss"]), "lengths": lengths}
        append(self._path, row | {"seconds": round(now - self._ended, 4), "tokens": sum(lengths)})
        self._ended = now


def document_lengths(inputs: dict[str, torch.Tensor]) -> list[int]:
    """Tokens of each document of a batch."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(1).tolist()
    # Laid end to end, each document begins at position 0.
    starts = torch.nonzero(inputs["position_ids"].flatten() == 0).flatten().tolist()
    ends = [*starts[1:], inputs["position_ids"].numel()]
    return [end - start for start, end in zip(starts, ends, strict=True)]


def main() -> None:
    folder, side = pathlib.Path(sys.argv[1]), sys.argv[2]
    job, out = read_texts(folder), folder / side
    out.mkdir(exist_ok=True)
    torch.set_num_threads(job.threads)
    packing = side == "trl_bfd"
    documents = job.documents()
    batches = len(documents) // ROWS
    if packing:
        batches = sum(map(len, documents)) // (ROWS * LONGEST)
    config = SFTConfig(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=ROWS,
        max_steps=max(1, batches) * job.passes,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        max_length=LONGEST,
        packing=packing,
        packing_strategy="bfd",
        logging_steps=1,
        save_strategy="no",
        # The fastest setting of the peer, and the precision of ours.
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
    )
    recorder = Recorder(out / "steps.jsonl")

    class Measured(SFTTrainer):
        """Notes which documents each step has."""

        def compute_loss(self, model, inputs, *args, **kwargs):
            recorder.lengths.append(document_lengths(inputs))
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Measured(
        model=job.model,
        args=config,
        train_dataset=Dataset.from_dict({"input_ids": [ids.tolist() for ids in documents]}),
        processing_class=tokenizer(),
        callbacks=[recorder],
    )
    trainer.train()
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    done = {"peak_mib": round(peak_mib()), "versions": versions, "batches": max(1, batches)}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
