"""The option that an unknown key probably means."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

_ELSEWHERE = {
    "data.rows": "batch_size train_batch_size global_batch_size per_device_train_batch_size bsz",
    "data.length": "max_length max_seq_length max_seq_len seq_len sequence_length block_size "
    "context_length cutoff_len",
    "data.epochs": "num_epochs num_train_epochs n_epochs",
    "data.train": "dataset datasets dataset_name train_file train_files files",
    "data.train: [{path: …, columns: …}]": "columns",
    "data.train: [{path: …, form: …}]": "form",
    "model.source": "model_name model_name_or_path base_model pretrained",
    "model.dtype": "torch_dtype precision param_dtype",
    "model.compute_dtype": "bf16 fp16",
    "model.remat": "gradient_checkpointing checkpointing",
    "model.lora": "peft adapters adapter peft_config",
    "optimizer.learning_rate": "lr",
    "optimizer.name": "optim",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type scheduler",
    "optimizer.warmup_steps": "warmup num_warmup_steps",
    "optimizer.max_grad_norm": "grad_clip gradient_clipping clip_grad clip max_norm",
    "optimizer.b1": "beta1 adam_beta1",
    "optimizer.b2": "beta2 adam_beta2",
    "optimizer.eps": "epsilon adam_epsilon",
    "run.steps": "max_steps num_steps iterations total_steps",
    "run.micro_batches": "gradient_accumulation_steps grad_accum accumulate accumulation_steps",
    "run.folder": "output_dir out_dir output out save_dir",
    "run.log_every": "logging_steps log_interval",
    "run.eval_every": "eval_steps eval_interval",
    "run.save_every": "save_steps save_interval",
    "run.keep": "save_total_limit",
    "run.resume": "resume_from_checkpoint",
    "run.trackers": "report_to wandb tensorboard",
}
_OPTIONS = {name: option for option, names in _ELSEWHERE.items() for name in names.split()}


def hint(key: str, where: str, fields: Iterable[str], root: Any) -> str:
    """What to say of an unknown key.

    Args:
      key: the key.
      where: its section with a final dot, or "".
      fields: the keys that the section knows.
      root: the class of the whole configuration.
    """
    sections = _sections(root)
    option = _OPTIONS.get(key.lower().replace("-", "_"), "")
    if "[" in where:  # an entry of a list, such as a reward, has keys of its own
        option = ""
    if option.partition(".")[0] in sections:
        return f"did you mean {option}?"
    near = difflib.get_close_matches(key, fields, 1, 0.5)
    if near:
        return f"did you mean {where}{near[0]}?"
    same = [f"{section}.{key}" for section, names in sections.items() if key in names]
    if len(same) == 1:
        return f"did you mean {same[0]}?"
    return f"known: {', '.join(fields)}"


def _sections(root: Any) -> dict[str, set[str]]:
    """Section → its options."""
    hints = typing.get_type_hints(root)
    return {
        name: {field.name for field in dataclasses.fields(section)}
        for name, section in hints.items()
        if dataclasses.is_dataclass(section)
    }
