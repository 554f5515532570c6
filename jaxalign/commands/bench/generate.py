"""Measures generation by `jaxalign.sample`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.commands.bench.case import Case, Runner, Sample
from jaxalign.commands.bench.random import random_decoder
from jaxalign.commands.bench.rows import prompt_batch
from jaxalign.models.flops import decode_flops, work_of
from jaxalign.sampling.generate import sample


def generate_runner(case: Case, mesh: Mesh) -> Runner:
    """One call of `sample`: reads prompts, and every answer has the maximum length."""
    model, params = random_decoder(case.model_config(case.dtype), mesh, case.remat)
    prompts, key = prompt_batch(case), jax.random.key(2)
    work = work_of(prompts)
    mean = round(work.tokens / case.rows)
    flops = decode_flops(model.config, work, case.rows, mean, case.new_tokens)

    def call(new_tokens: int) -> float:
        start = time.perf_counter()
        out = sample(model, params, prompts, key, max_new_tokens=new_tokens)
        jax.block_until_ready(out.tokens)
        return time.perf_counter() - start

    def run() -> Sample:
        seconds = call(case.new_tokens)
        return Sample(seconds, case.rows * case.new_tokens, flops, {})

    def facts(samples: Sequence[Sample]) -> dict[str, Any]:
        """The time of a decode step, and the bytes that it must read."""
        call(1)
        first = min(call(1) for _ in range(3))
        whole = float(np.median([one.seconds for one in samples]))
        steps = max(1, case.new_tokens - 1)
        config = model.config
        weights = sum(x.size for x in jax.tree.leaves(params))
        if not config.tie_embeddings:
            weights -= config.vocab_size * config.hidden_size  # of the embedding, one row per token
        columns = work.tokens + case.rows * case.new_tokens / 2
        cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * columns
        return {
            "first_token_seconds": first,
            "decode_step_seconds": (whole - first) / steps,
            "decode_step_bytes": (weights + cache) * jnp.dtype(case.dtype).itemsize,
        }

    return Runner(run, None, facts)
