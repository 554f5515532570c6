"""The peers' side of `ppo_speed.py`: PYTHON-OF-THE-PEER _ppo_trl.py FOLDER

PPO is TRL's experimental PPOTrainer (1.12), GRPO its GRPOTrainer (1.16), generation transformers'
own `generate`.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pathlib
import sys
import time

import numpy as np
import torch
from _job import append, peak_mib
from _ppo import FIRST, PAD, STOP, Rollouts, read_rollouts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LogitsProcessor,
    LogitsProcessorList,
    TrainerCallback,
)


class Ends(LogitsProcessor):
    """Makes every answer stop at its length, and nowhere else."""

    def __init__(self, prompt: int, lengths: list[int]):
        self._prompt, self._lengths = prompt, torch.tensor(lengths)

    def __call__(self, input_ids, scores):
        written = input_ids.shape[1] - self._prompt + 1
        scores[:, [PAD, STOP]] = -torch.inf
        ends = written == self._lengths
        if ends.any():
            scores[ends] = -torch.inf
            scores[ends, STOP] = 0.0
        return scores


def generations(job: Rollouts, out: pathlib.Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor(job.prompt_ids(), dtype=torch.long)
    for number in range(len(job.steps)):
        start = time.perf_counter()
        torch.manual_seed(number)
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job.new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=PAD,
        )
        row = {"step": number, "seconds": round(time.perf_counter() - start, 4)}
        append(out / "steps.jsonl", row | {"written": (written.shape[1] - ids.shape[1]) * len(ids)})


class Recorder(TrainerCallback):
    """Writes the time of every iteration as it ends, and sets the next one's lengths."""

    def __init__(self, job: Rollouts, policy: torch.nn.Module, path: pathlib.Path):
        self._job, self._policy, self._path = job, policy, path
        self._generate, self._row = policy.generate, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._set(0)
        self._ended = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs):
        names = {"kl": ("objective/kl", "kl"), "loss": ("loss/policy_avg", "loss")}
        found = {k: logs[n] for k, known in names.items() for n in known if n in (logs or {})}
        self._row = found or self._row
        # What GRPO's trainer wrote, as it counts it: another length would be another job.
        mean = (logs or {}).get("completions/mean_length")
        wanted = self._job.steps[min(state.global_step, len(self._job.steps)) - 1]
        if mean is not None and abs(float(mean) - np.mean(wanted)) > 1e-3:
            raise ValueError(f"answers of {mean} tokens, wanted {np.mean(wanted)}")

    def on_step_end(self, args, state, control, **kwargs):
        now, number = time.perf_counter(), state.global_step - 1
        row = {"step": number, "seconds": round(now - self._ended, 4)}
        if number < len(self._job.steps):
            append(self._path, row | {"written": sum(self._job.steps[number])} | self._row)
        self._set(number + 1)
        self._ended = time.perf_counter()

    def _set(self, number: int) -> None:
        if number < len(self._job.steps):
            ends = LogitsProcessorList([Ends(self._job.prompt_length, self._job.steps[number])])
            self._policy.generate = functools.partial(self._generate, logits_processor=ends)


def iterations(job: Rollouts, out: pathlib.Path) -> None:
    from _trl import tokenizer
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    def scorer():
        return AutoModelForSequenceClassification.from_pretrained(
            job.scorer, num_labels=1, dtype=torch.float32
        )

    def causal():
        return AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32)

    policy = causal()
    args = PPOConfig(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=job.prompts,
        local_rollout_forward_batch_size=job.prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=job.epochs,
        total_episodes=job.prompts * len(job.steps),
        response_length=job.new_tokens,
        stop_token_id=STOP,
        temperature=1.0,
        learning_rate=3e-6,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        disable_tqdm=True,
    )
    data = Dataset.from_dict({"input_ids": job.prompt_ids().tolist()})
    trainer = PPOTrainer(
        args,
        processing_class=tokenizer(),
        model=policy,
        ref_model=causal(),
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=data,
        eval_dataset=data,
        callbacks=[Recorder(job, policy, out / "steps.jsonl")],
    )
    trainer.train()


def groups(job: Rollouts, out: pathlib.Path) -> None:
    """GRPO; prompts are words, one for each id, since the trainer takes text."""
    from datasets import Dataset
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    # Special tokens are also found inside words: their names must not begin other names.
    names = {"<pad>": PAD, "<end>": STOP} | {f"w{i}": i for i in range(FIRST, job.vocab)}
    words = Tokenizer(WordLevel(names, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )
    policy = AutoModelForCausalLM.from_pretrained(job.policy, dtype=torch.float32)
    args = GRPOConfig(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=job.prompts,
        gradient_accumulation_steps=1,
        num_generations=job.samples,
        max_completion_length=job.new_tokens,
        num_iterations=job.epochs,
        max_steps=len(job.steps) * job.epochs,
        beta=0.04,
        loss_type="grpo",
        temperature=1.0,
        top_k=0,
        learning_rate=3e-6,
        shuffle_dataset=False,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    ids = job.prompt_ids()[:: job.samples]
    data = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids.tolist()]})

    def reward(completion_ids, **_):
        return [float(row[0] % 7) for row in completion_ids]

    recorder = Recorder(job, policy, out / "steps.jsonl")
    trainer = GRPOTrainer(policy, reward, args, data, processing_class=tok, callbacks=[recorder])
    trainer.train()


RUNS = {"ppo": iterations, "grpo": groups, "generate": generations}


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    job, out = read_rollouts(folder), folder / "ppo_trl"
    out.mkdir(exist_ok=True)
    torch.set_num_threads(job.threads)
    np.random.seed(0)
    RUNS[job.what](job, out)
    versions = {name: importlib.metadata.version(name) for name in ("trl", "transformers", "torch")}
    done = {"peak_mib": round(peak_mib(), 1), "versions": versions}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
