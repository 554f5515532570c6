"""Rules for TRL's arguments that need more than renaming: models, data, batches, schedules."""

from __future__ import annotations

from typing import Any

from jaxalign.algorithms.optim import OPTIMIZERS
from jaxalign.commands.convert_trl.conversion import Conversion

_LORA = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_PACKING = {"bfd": "best_fit", "bfd_split": "best_fit_split", "wrapped": "wrapped"}
_KEEP = {"keep_start": "answer_start", "keep_end": "prompt_end"}
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "warmup_stable_decay": "wsd",
}
_OPTIMIZERS = {
    "adafactor": "adafactor",
    "lion_32bit": "lion",
    "lion": "lion",
    "paged_lion_32bit": "lion",
    "sgd": "sgd",
}
_MOMENT_OPTIONS = {"adam_beta1": "b1", "adam_beta2": "b2", "adam_epsilon": "eps"}
_MOMENTS = {
    "adamw_8bit": "int8",
    "adamw_bnb_8bit": "int8",
    "paged_adamw_8bit": "int8",
    "adamw_torch_8bit": "int8",
}
SOURCE, DATA = "MODEL", "DATA"
"""What stands where the file names no model or data."""


def convert_model(c: Conversion) -> None:
    """The model, its dtypes, adapters and rematerialisation."""
    source = c.take("model_name_or_path") or c.take("sft_model_path")
    revision = c.take("model_revision", "main")
    if source is None:
        c.note("model.source", f"the file names no model; write it in place of {SOURCE}")
        source, revision = SOURCE, "main"
    c.put("model.source", source if revision == "main" else f"{source}@{revision}")
    dtype = c.take("dtype") or c.take("torch_dtype")
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        if name in ("float32", "bfloat16", "float16"):
            c.put("model.dtype", name)
        else:
            c.note(f"dtype: {dtype!r}", "weights are float32 unless model.dtype says otherwise")
    for flag, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if c.take(flag):
            c.put("model.compute_dtype", name)
    if c.take("attn_implementation") is not None:
        c.put("model.attention", "auto")
    if c.take("activation_offloading"):
        c.take("gradient_checkpointing")
        c.put("model.remat", "offload")
    elif c.take("gradient_checkpointing") or c.take("activation_checkpointing"):
        c.put("model.remat", "block")
    template = c.take("chat_template_path")
    if template is not None:
        if str(template).endswith(".jinja"):
            c.put("model.chat_template", template)
        else:
            c.put("model.tokenizer", template)
            c.note(
                f"chat_template_path: {template!r}", "taken as model.tokenizer; check its tokens"
            )
    _convert_lora(c)


def _convert_lora(c: Conversion) -> None:
    if not c.take("use_peft"):
        for name in ("r", "alpha", "target_modules", "dropout", "modules_to_save"):
            c.take(f"lora_{name}")
        for name in ("use_rslora", "use_dora"):
            c.take(name)
        for name in ("load_in_4bit", "load_in_8bit"):
            if c.take(name):
                c.note(name, "without use_peft nothing could be trained: give model.lora")
        c.take("use_bnb_nested_quant")
        return
    rank, alpha = c.number("lora_r", 16), c.number("lora_alpha", 32)
    targets = c.take("lora_target_modules", ["q_proj", "v_proj"])
    targets = [targets] if isinstance(targets, str) else list(targets)
    if targets in (["all-linear"], ["all_linear"]):
        targets = list(_LORA)
    for name in targets:
        if name not in _LORA:
            c.note(f"lora_target_modules: {name!r}", f"known are {', '.join(_LORA)}")
    c.put("model.lora.rank", rank)
    c.put("model.lora.alpha", alpha)
    c.put("model.lora.targets", [_LORA[name] for name in targets if name in _LORA])
    for name, option in (("use_rslora", "rslora"), ("use_dora", "dora")):
        if c.take(name):
            c.put(f"model.lora.{option}", True)
    _convert_quantized(c)
    dropout = c.number("lora_dropout", 0.05)  # TRL's default
    if dropout:
        c.note(f"lora_dropout: {dropout}", "adapters have no dropout here")
    if kept := c.take("lora_modules_to_save"):
        c.note(f"lora_modules_to_save: {kept}", "give model.lora.modules_to_save our names")


def _convert_quantized(c: Conversion) -> None:
    double = c.take("use_bnb_nested_quant")
    if c.take("load_in_4bit"):
        c.put("model.quantize", "nf4-double" if double else "nf4")
    if c.take("load_in_8bit"):
        c.put("model.quantize", "int8")


def convert_data(c: Conversion) -> None:
    """Sources, lengths, packing and the trained tokens."""
    name, config = c.take("dataset_name"), c.take("dataset_config")
    train, test = c.take("dataset_train_split", "train"), c.take("dataset_test_split", "test")
    evaluated = c.look("evaluation_strategy") or c.look("eval_strategy")
    entries = [_entry(c, entry) for entry in c.take("datasets", [])]
    if entries:
        c.put("data.train", entries)
    elif name is not None:
        c.put("data.train", [_where(name, config, train)])
        if evaluated not in (None, "no"):
            c.put("data.eval", [_where(name, config, test)])
    else:
        c.put("data.train", [DATA])
        c.note("data.train", f"the file names no data; write it in place of {DATA}")
    column = c.take("dataset_text_field", "text")
    if column != "text":
        train_of = c.values["data"]["train"]
        c.values["data"]["train"] = [
            {"path": where, "columns": {"text": column}} if isinstance(where, str) else where
            for where in train_of
        ]
    order = c.take("train_sampling_strategy")
    if order == "sequential" and c.trainer != "kto":
        c.put("data.shuffle", False)
    elif order == "group_by_length":
        c.note(f"train_sampling_strategy: {order!r}", "data.buckets puts like lengths together")
    c.take("shuffle_dataset")  # a new order in every pass, also in TRL's random sampler
    keep = c.take("truncation_mode")
    if keep is not None and keep in _KEEP and c.trainer not in ("ppo", "grpo", "rloo"):
        c.put("data.keep", _KEEP[keep])
    for old in ("max_length", "max_seq_length"):
        length = c.number(old)
        if length is not None:
            c.put("data.length", length)
    prompt = c.number("max_prompt_length")
    if prompt is not None:
        if c.trainer in ("ppo", "grpo", "rloo"):
            c.put("data.length", prompt)
        else:
            c.note(f"max_prompt_length: {prompt}", "data.length bounds prompt and answer together")
    _convert_packing(c)


def _convert_packing(c: Conversion) -> None:
    packing, strategy = c.take("packing"), c.take("packing_strategy", "bfd")
    c.take("eval_packing")
    if packing:
        c.put("data.packing", _PACKING.get(strategy, True))
        if strategy == "bfd_split":
            c.values["data"].pop("keep", None)  # nothing is cut off
    elif c.trainer in ("sft", "reward", "dpo"):
        c.put("data.packing", False)
    everything = c.take("completion_only_loss") is False
    answers = c.take("assistant_only_loss")
    if c.trainer != "sft" or answers:
        return
    if everything:
        c.put("data.train_on", "everything")
    else:
        c.note(
            "data.train_on: all",
            "only answers are trained, where TRL trains every token of `messages`; "
            "data.train_on=everything does too",
        )


def _where(name: str, config: str | None, split: str) -> str:
    """A source as one text: `owner/name:config:split`; the split train is understood."""
    parts = [name, *([config] if config else []), *([split] if split != "train" else [])]
    if config and split == "train":
        parts.append(split)
    return ":".join(parts)


def _entry(c: Conversion, entry: Any) -> Any:
    """One of `datasets`."""
    if not isinstance(entry, dict) or "path" not in entry:
        raise ValueError(f"datasets: got {entry!r}; wanted entries with a path")
    for key in ("data_dir", "data_files", "columns", "fraction"):
        if entry.get(key) is not None:
            c.note(
                f"datasets[].{key}: {entry[key]}",
                "give the files as paths of data.train, and columns, rows or weight of its entries",
            )
    return _where(entry["path"], entry.get("name"), entry.get("split") or "train")


def convert_batches(c: Conversion) -> None:
    """The batch of an update, over all processes, and its parts."""
    if c.trainer in ("ppo", "grpo", "rloo"):
        return  # `rollouts` counts answers
    rows, parts = c.number("per_device_train_batch_size"), c.number("gradient_accumulation_steps")
    c.put("data.rows", rows * parts * c.processes)
    if parts > 1:
        c.put("run.micro_batches", parts)


def convert_length(c: Conversion, updates: int = 1) -> None:
    """How long the run is.

    Args:
      c: the conversion.
      updates: updates of one of our steps; more than one in PPO and its relatives.
    """
    steps, epochs = c.number("max_steps"), c.number("num_train_epochs")
    if steps > 0:
        c.put("run.steps", -(-steps // updates))
        c.put("data.epochs", None)
    else:
        c.put("run.epochs", epochs)


def convert_optimizer(c: Conversion) -> None:
    """The optimizer and its schedule."""
    kind = str(c.take("optim", "adamw"))
    if kind in _MOMENTS:
        c.put("optimizer.moments", _MOMENTS[kind])
    elif kind in _OPTIMIZERS:
        c.put("optimizer.name", _OPTIMIZERS[kind])
        for name, option in _MOMENT_OPTIONS.items():
            if option not in OPTIMIZERS[_OPTIMIZERS[kind]]:
                c.take(name)  # nor does the trainer hand it over
    elif not kind.startswith(("adamw", "paged_adamw")):
        c.note(f"optim: {kind!r}", "AdamW is used; see optimizer.name; any optax works in Python")
    c.put("optimizer.learning_rate", c.number("learning_rate"))
    for name in ("weight_decay", "max_grad_norm"):
        c.put(f"optimizer.{name}", c.number(name))
    schedule = str(c.take("lr_scheduler_type"))
    extra = c.take("lr_scheduler_kwargs", {})
    if schedule not in _SCHEDULES:
        known = "linear, cosine, wsd or constant; constant is used"
        c.note(f"lr_scheduler_type: {schedule!r}", known)
    c.put("optimizer.schedule", _SCHEDULES.get(schedule, "constant"))
    if isinstance(extra, dict) and "min_lr_rate" in extra:
        c.put("optimizer.end_fraction", float(extra["min_lr_rate"]))
    elif schedule == "warmup_stable_decay" and "num_decay_steps" in extra:
        total = c.look("max_steps")
        if total > 0:
            c.put("optimizer.decay_ratio", float(extra["num_decay_steps"]) / total)
        else:
            c.note(f"lr_scheduler_kwargs: {extra}", "wanted max_steps beside it")
    elif extra:
        c.note(f"lr_scheduler_kwargs: {extra}", "optimizer.end_fraction is the last rate over peak")
    if c.trainer != "sft":
        c.leave("neftune_noise_alpha", "SFT only")
    warmup, ratio = c.number("warmup_steps"), c.number("warmup_ratio")
    if schedule == "constant":  # which has no warm-up in transformers
        return
    if warmup and warmup >= 1:
        c.put("optimizer.warmup_steps", int(warmup))
    elif warmup or ratio:
        c.put("optimizer.warmup_ratio", warmup or ratio)


def convert_run(c: Conversion) -> None:
    """The folder, evaluations, checkpoints and the seed."""
    c.put("run.folder", c.take("output_dir", f"runs/{c.trainer}"))
    c.put("run.seed", c.number("seed"))
    c.take("data_seed")
    logged = c.number("logging_steps")
    if logged >= 1:
        c.put("run.log_every", int(logged))
    else:
        c.note(f"logging_steps: {logged}", "a part of all steps; give a number: run.log_every")
    evaluated = c.take("evaluation_strategy")
    evaluated = evaluated or c.take("eval_strategy")
    _convert_every(c, evaluated, "eval_steps", c.number("eval_steps", logged), "run.eval_every")
    saved = c.take("save_strategy")
    _convert_every(c, saved, "save_steps", c.number("save_steps"), "run.save_every")
    if c.take("save_only_model"):
        c.put("run.checkpoint", False)
    resume = c.take("resume_from_checkpoint")
    if resume is True or resume == "True":
        c.put("run.resume", True)
    elif resume:
        c.note(f"resume_from_checkpoint: {resume!r}", "checkpoints of TRL are not read")


def _convert_every(c: Conversion, strategy: Any, name: str, steps: Any, option: str) -> None:
    if strategy == "epoch":
        c.put(option, "epoch")
    elif strategy == "steps" and steps >= 1:
        c.put(option, int(steps))
    elif strategy == "steps":
        c.note(f"{name}: {steps}", f"a part of all steps; give a number of batches: {option}")
    elif strategy == "best":
        c.note("save_strategy: best", "run.early_stopping watches a held-out figure")
