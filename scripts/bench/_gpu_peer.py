"""A peer's side of `gpu.py`: PYTHON-OF-THE-PEER _gpu_peer.py '{"what": "sft", …}'; prints JSON.

SFT and DPO are TRL's trainers where TRL is installed, else a plain loop over transformers' model
with torch's fused AdamW, which leaves a trainer's overhead out. Generation is transformers' own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def build(job: dict[str, Any]) -> Any:
    shape = job["shape"]
    kinds = (LlamaConfig, LlamaForCausalLM)
    if shape["qk_norm"] == "head":
        kinds = (Qwen3Config, Qwen3ForCausalLM)
    config = kinds[0](
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        num_key_value_heads=shape["num_kv_heads"],
        head_dim=shape["head_dim"],
        tie_word_embeddings=shape["tie_embeddings"],
        max_position_embeddings=16384,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    kind = getattr(torch, job["dtype"])
    with torch.device(DEVICE):
        previous = torch.get_default_dtype()
        torch.set_default_dtype(kind)
        model = kinds[1](config)
        torch.set_default_dtype(previous)
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    return model


def draw(job: dict[str, Any], rows: int, length: int) -> torch.Tensor:
    return torch.randint(2, job["shape"]["vocab_size"], (rows, length), device=DEVICE)


def repeat(job: dict[str, Any], run: Callable[[], Any], tokens: int) -> dict[str, Any]:
    for _ in range(2):
        run()
    wait()
    seconds = []
    for _ in range(job["repeats"]):
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    step = statistics.median(seconds)
    return {"step_seconds": step, "tokens_per_second": tokens / step}


def plain_sft(job: dict[str, Any]) -> dict[str, Any]:
    model = build(job).train()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=CUDA)
    ids = draw(job, job["rows"], job["length"])

    def run() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return repeat(job, run, ids.numel())


def plain_dpo(job: dict[str, Any]) -> dict[str, Any]:
    model, reference = build(job).train(), build(job).eval()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=CUDA)
    ids = draw(job, 2 * job["rows"], job["length"])

    def logps(net: Any) -> torch.Tensor:
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1]
        of_each = -F.cross_entropy(
            logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        ).view(len(ids), -1)
        return of_each.sum(1)

    def run() -> None:
        with torch.no_grad():
            old = logps(reference)
        chosen, rejected = (logps(model) - old).chunk(2)
        (-F.logsigmoid(0.1 * (chosen - rejected)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)

    return repeat(job, run, ids.numel())


def generate(job: dict[str, Any]) -> dict[str, Any]:
    model = build(job).eval()
    model.generation_config.eos_token_id = None
    ids = draw(job, job["rows"], job["length"])

    @torch.no_grad()
    def run() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=job["new_tokens"],
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )

    return repeat(job, run, job["rows"] * job["new_tokens"])


def trl_step(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer; the first two steps are left out."""
    import numpy as np
    from _trl import Tokenized, tokenizer
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, SFTConfig, SFTTrainer

    steps, rows = job["repeats"] + 2, job["rows"]
    rng = np.random.default_rng(0)
    shape = (steps * rows, job["length"])
    ends: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            wait()
            ends.append(time.perf_counter())

    options = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": rows,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "max_length": job["length"],
        "logging_steps": 1000,
        "save_strategy": "no",
        "gradient_checkpointing": job["checkpointing"],
        "bf16": False,  # the weights are bfloat16 themselves
        "use_cpu": not CUDA,
        "report_to": "none",
        "disable_tqdm": True,
    }
    ids = rng.integers(2, job["shape"]["vocab_size"], shape)
    others: dict[str, Any] = {}
    if job["what"] == "sft":
        data = Dataset.from_dict({"input_ids": ids.tolist()})
        kind, config, tokens = SFTTrainer, SFTConfig(**options), rows * job["length"]
    else:
        cut = job["length"] // 4
        other = rng.integers(2, job["shape"]["vocab_size"], shape)
        columns = {"prompt_ids": ids[:, :cut], "chosen_ids": ids[:, cut:]}
        columns["rejected_ids"] = other[:, cut:]
        data = Dataset.from_dict({name: value.tolist() for name, value in columns.items()})
        kind, config, tokens = Tokenized, DPOConfig(**options), 2 * rows * job["length"]
        # A model that is not from a folder cannot be loaded again as its own reference.
        others["ref_model"] = build(job)
    trainer = kind(
        model=build(job), args=config, train_dataset=data, processing_class=tokenizer(),
        callbacks=[Times()], **others,
    )  # fmt: skip
    trainer.train()
    step = statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))
    return {"step_seconds": step, "tokens_per_second": tokens / step}


def main() -> None:
    job = json.loads(sys.argv[1])
    has_trl = importlib.util.find_spec("trl") is not None and job["what"] != "generate"
    plain = {"sft": plain_sft, "dpo": plain_dpo, "generate": generate}[job["what"]]
    names = ("torch", "transformers", *(["trl"] if has_trl else []))
    record = (trl_step if has_trl else plain)(job)
    record |= {"library": "trl" if has_trl else "transformers"}
    record |= {"versions": {name: importlib.metadata.version(name) for name in names}}
    if CUDA:
        record["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
