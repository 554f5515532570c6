"""Generation and iterations of PPO, as a run makes them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms import ppo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state
from jaxalign.commands.bench.case import Case, Runner, Sample
from jaxalign.commands.bench.rows import prompt_batch
from jaxalign.commands.bench.sizes import SIZES
from jaxalign.commands.bench.updates import adam, decoder
from jaxalign.models.flops import decode_flops, ppo_flops, work_of
from jaxalign.models.scorer import with_scalar_head
from jaxalign.parallel.sharding import local_rows
from jaxalign.rewards.model import model_reward
from jaxalign.run.metrics import Stopwatch
from jaxalign.sampling.generate import sample

_MEAN_SHARE = 2
"""Ragged answers of PPO end after `new_tokens / _MEAN_SHARE` tokens on average, were none cut."""


def generate_runner(case: Case, mesh: Mesh) -> Runner:
    """One call of `sample`: prompts are read, every answer is as long as it may be."""
    model, params = decoder(case, mesh, case.dtype)
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
        """What a step of decoding takes, and the bytes that it cannot do without."""
        call(1)
        first = min(call(1) for _ in range(3))
        whole = float(np.median([one.seconds for one in samples]))
        steps = max(1, case.new_tokens - 1)
        config = model.config
        weights = sum(x.size for x in jax.tree.leaves(params))
        if not config.tie_embeddings:
            weights -= config.vocab_size * config.hidden_size  # of the embedding, a row a token
        columns = work.tokens + case.rows * case.new_tokens / 2
        cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * columns
        return {
            "first_token_seconds": first,
            "decode_step_seconds": (whole - first) / steps,
            "decode_step_bytes": (weights + cache) * jnp.dtype(case.dtype).itemsize,
        }

    return Runner(run, None, facts)


def ppo_runner(case: Case, mesh: Mesh) -> Runner:
    """One iteration: rollout, reward model, experience, and the updates of all epochs."""
    model, params = decoder(case, mesh)
    critic, scorer_params = with_scalar_head(model, params, jax.random.key(1))
    stops: tuple[int, ...] = ()
    if case.layout != "full":
        # Random weights choose among all tokens alike: so many ends make so long answers.
        count = max(1, round(SIZES[case.size].vocab_size * _MEAN_SHARE / case.new_tokens))
        stops = tuple(range(1, 1 + count))
    config = ppo.Config(max_new_tokens=case.new_tokens, stop_tokens=stops)
    tx = ppo.make_optimizer(adam(case), adam(case))
    state = init_state(ppo.init_params(params, scorer_params), tx)
    watch = Stopwatch()
    reward = watch.around(model_reward(critic, scorer_params), "rollout", "reward")
    prepare = ppo.make_prepare(model, critic, reward, config)
    parts = case.parts(mesh)
    step = compile_step(ppo.make_step(model, critic, tx, config, micro_batches=parts), state, mesh)
    # Answers are ragged, their prompts are not.
    prompts = prompt_batch(dataclasses.replace(case, layout="full"))
    pack = 16 if case.layout == "packed" else 0
    iterations = 0

    def run() -> Sample:
        nonlocal state, iterations
        start = time.perf_counter()
        key = jax.random.fold_in(jax.random.key(3), iterations)
        iterations += 1
        watch.start()
        rollout = prepare(key, state, params, prompts)
        watch.lap("experience", rollout)
        for part in ppo.minibatches(key, rollout, case.epochs, 1, pack=pack, multiple=parts):
            state, _ = step(state, part)
        seconds = watch.stop("update", state)
        whole = time.perf_counter() - start
        tokens = local_rows(rollout.tokens)
        flops = ppo_flops(tokens, model, critic, [critic], epochs=case.epochs)
        marks = {name.removeprefix("time/"): value for name, value in seconds.items()}
        real = float(np.sum(tokens.segment_ids > 0))
        return Sample(whole, real, flops.total, marks, 1 - real / tokens.inputs.size)

    return Runner(run, lambda: step.compiles)
