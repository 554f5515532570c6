"""Tunix's side of `ppo_speed.py`, generation: PYTHON-OF-THE-PEER _ppo_tunix.py FOLDER"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
import time

from _job import append, peak_mib
from _ppo import PAD, read_rollouts
from _tunix import random_llama
from tunix.generate.sampler import CacheConfig, Sampler


class Numbers:
    """A tokenizer whose texts are the numbers of the prompts."""

    def __init__(self, prompts):
        self._prompts = prompts

    def encode(self, text, **_):
        return self._prompts[int(text)].tolist()

    def decode(self, ids, **_):
        return str(len(ids))

    def bos_id(self):
        return 0  # none

    def eos_id(self):
        return -1  # no token ends an answer

    def pad_id(self):
        return PAD


def main() -> None:
    folder, side = pathlib.Path(sys.argv[1]), sys.argv[2]
    job, out = read_rollouts(folder), folder / side
    out.mkdir(exist_ok=True)
    _, hidden, layers, heads, _ = job.shape
    size = job.prompt_length + job.new_tokens
    cache = CacheConfig(
        cache_size=size, num_layers=layers, num_kv_heads=heads, head_dim=hidden // heads
    )
    sampler = Sampler(random_llama(job.shape), Numbers(job.prompt_ids()), cache)
    texts = [str(number) for number in range(job.prompts)]
    for number in range(len(job.steps)):
        start = time.perf_counter()
        written = sampler(
            texts,
            max_generation_steps=job.new_tokens,
            max_prompt_length=job.prompt_length,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[-1],
            seed=number,
        )
        row = {"step": number, "seconds": round(time.perf_counter() - start, 4)}
        append(out / "steps.jsonl", row | {"written": sum(map(len, written.tokens))})
    names = ("google-tunix", "jax", "flax")
    done = {"peak_mib": round(peak_mib(), 1)}
    done |= {"versions": {name: importlib.metadata.version(name) for name in names}}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
