"""TRL's side of a job (see `_job.py`): PYTHON-OF-THE-PEER _trl.py FOLDER

The pairs arrive as token ids, so that no tokenizer takes part: TRL is given one of two words, for
its padding id.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import time

import numpy as np
import torch
from _job import Job, Pairs, append, load_pairs, peak_mib, read_job
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback, trainer_utils
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

PAD = 0


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": PAD, "<end>": 1}, unk_token="<end>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def dataset(job: Job, pairs: Pairs) -> Dataset:
    """The columns that each trainer takes as already tokenized."""
    columns = {"chosen_ids": pairs.chosen, "rejected_ids": pairs.rejected}
    if job.algorithm == "dpo":
        columns = {
            name: [ids[n:] for ids, n in zip(side, pairs.prompts, strict=True)]
            for name, side in columns.items()
        }
        columns["prompt_ids"] = [
            ids[:n] for ids, n in zip(pairs.chosen, pairs.prompts, strict=True)
        ]
    return Dataset.from_dict({k: [ids.tolist() for ids in v] for k, v in columns.items()})


class Tokenized(DPOTrainer):
    """A DPOTrainer that takes token ids, as RewardTrainer does; only the tokenizing is left out."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class Recorder(TrainerCallback):
    """Writes loss and time of every step as it ends."""

    def __init__(self, path: pathlib.Path, tokens: list[int]):
        self._path, self._tokens, self._ended = path, tokens, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self._ended = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs:
            return
        now = time.perf_counter()
        step = state.global_step
        row = {"step": step, "loss": float(logs["loss"]), "seconds": round(now - self._ended, 4)}
        append(self._path, row | {"tokens": self._tokens[(step - 1) % len(self._tokens)]})
        self._ended = now


def make_trainer(job: Job, out: pathlib.Path):
    updates = job.updates()
    options = {
        "output_dir": str(out / "checkpoints"),
        "per_device_train_batch_size": job.peer_pairs,
        "gradient_accumulation_steps": job.pairs // job.peer_pairs,
        "max_steps": job.steps,
        "train_sampling_strategy": "sequential",
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": job.warmup_steps,
        "max_length": job.length,
        "logging_steps": 1,
        "save_strategy": "steps" if job.checkpoint_every else "no",
        "save_steps": job.checkpoint_every or 1,
        "save_total_limit": 1,
        # The fastest setting of the peer, and the precision of ours.
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "model_init_kwargs": {"dtype": "float32"},
    }
    if job.algorithm == "reward":
        trainer_class, config = RewardTrainer, RewardConfig(**options)
    else:
        trainer_class, config = Tokenized, DPOConfig(**options, beta=job.beta)
    return trainer_class(
        model=job.model,
        args=config,
        train_dataset=dataset(job, load_pairs(job.train).take(0, len(updates) * job.pairs)),
        processing_class=tokenizer(),
        callbacks=[Recorder(out / "steps.jsonl", [pairs.tokens for pairs in updates])],
    )


@torch.no_grad()
def score(job: Job, trainer: RewardTrainer, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both answers of every pair, as the trainer's own evaluation computes them."""
    trainer.model.eval()
    chosen, rejected = [], []
    rows = dataset(job, pairs).to_list()
    for at in range(0, len(rows), job.peer_pairs):
        inputs = trainer.data_collator(rows[at : at + job.peer_pairs])
        logits = trainer.model(**inputs, use_cache=False).logits.squeeze(-1)
        first, second = torch.chunk(logits, 2)
        chosen += first.tolist()
        rejected += second.tolist()
    return np.array(chosen, np.float32), np.array(rejected, np.float32)


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    job, out = read_job(folder), folder / "trl"
    out.mkdir(exist_ok=True)
    torch.set_num_threads(job.threads)
    trainer = make_trainer(job, out)
    saved = out / "checkpoints"
    last = trainer_utils.get_last_checkpoint(str(saved)) if saved.exists() else None
    loaded_peak = peak_mib()
    trainer.train(resume_from_checkpoint=last)
    training_peak = peak_mib()
    if job.held_out is not None:
        chosen, rejected = score(job, trainer, load_pairs(job.held_out))
        np.savez(out / "scores.npz", chosen=chosen, rejected=rejected)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    done = {"peak_mib": round(training_peak), "loaded_mib": round(loaded_peak)}
    done |= {"versions": versions}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
