"""jaxalign's side of `ppo_speed.py`: python _ppo_ours.py FOLDER"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from _job import append, peak_mib
from _ppo import PAD, Rollouts, read_rollouts

import jaxalign as ja
from jaxalign import ppo
from jaxalign.algorithms.ppo import prepare as ppo_prepare
from jaxalign.commands.bench.case import cached_rows, row_parts
from jaxalign.commands.startup.freed_memory import return_freed_memory
from jaxalign.rewards import model_reward
from jaxalign.sampling.generate import sample

ADAM = ja.OptimizerConfig(learning_rate=3e-6, schedule="linear", total_steps=1000)


def load(folder: str) -> tuple[Any, Any]:
    return ja.load_pretrained(folder, mesh=ja.make_mesh(data=-1, fsdp=1), compute_dtype="float32")


def generations(job: Rollouts, model: Any, params: Any, prompts: Any) -> Iterator[dict[str, Any]]:
    for number, lengths in enumerate(job.steps):
        key = jax.random.key(number)
        out = sample(
            model, params, prompts, key, max_new_tokens=job.new_tokens, lengths=np.array(lengths)
        )
        yield {"written": int(np.asarray(out.mask).sum())}


def iterations(job: Rollouts, model: Any, params: Any, prompts: Any) -> Iterator[dict[str, Any]]:
    """PPO with a reward model and a critic."""
    critic, rm_params = ja.load_pretrained(
        job.scorer, mesh=ja.make_mesh(data=-1, fsdp=1), compute_dtype="float32"
    )
    config = ppo.Config(
        max_new_tokens=job.new_tokens, pad_token=PAD, temperature=1.0, pack_experience=job.pack
    )
    tx = ppo.make_optimizer(ja.make_optimizer(ADAM), ja.make_optimizer(ADAM))
    state = ja.init_state(ppo.init_params(params, rm_params), tx)
    prepare = ppo.make_prepare(model, critic, model_reward(critic, rm_params), config)

    def make_step(parts: int) -> Any:
        return ppo.make_step(model, critic, tx, config, micro_batches=parts)

    return updates(job, state, prepare, make_step, params, prompts)


def grouped(job: Rollouts, model: Any, params: Any, prompts: Any) -> Iterator[dict[str, Any]]:
    """GRPO: several answers to each prompt, an update an iteration, a reward that costs nothing."""
    config = ppo.Config(
        max_new_tokens=job.new_tokens, pad_token=PAD, temperature=1.0, samples=job.samples,
        advantage_estimator="grpo", loss_aggregation="sequence", kl_in="loss", kl_estimator="k3",
        kl_coef=0.04, pack_experience=job.pack, shared_prompts=True,
    )  # fmt: skip
    tx = ja.make_optimizer(ADAM)
    state = ja.init_state(ppo.init_params(params), tx)

    def reward(tokens: Any, prompts: Any) -> np.ndarray:
        return np.asarray(tokens.inputs)[:, job.prompt_length].astype(np.float32) % 7

    def make_step(parts: int) -> Any:
        return ppo.make_step(model, None, tx, config, micro_batches=parts)

    prepare = ppo.make_prepare(model, None, reward, config)
    each = jax.tree.map(lambda x: x[:: job.samples], prompts)
    return updates(job, state, prepare, make_step, params, each)


def updates(
    job: Rollouts, state: Any, prepare: Any, make_step: Any, params: Any, prompts: Any
) -> Iterator[dict[str, Any]]:
    """The iterations of a job; `make_step` makes the step of so many micro-batches."""
    steps: dict[tuple[int, ...], Any] = {}  # of every shape that a batch may have
    reference = jax.tree.map(lambda x: x.copy(), params)
    for number, lengths in enumerate(job.steps):
        start = time.perf_counter()
        # The peer's answers end where its `generate` is told to; so do ours.
        ppo_prepare.sample = functools.partial(sample, lengths=np.array(lengths))
        rollout = prepare(jax.random.key(number), state, reference, prompts)
        prepared = time.perf_counter()
        metrics: list[dict[str, jax.Array]] = [ppo.rollout_metrics(rollout, job.samples)]
        for part in ppo.minibatches(
            jax.random.key(number), rollout, job.epochs, 1, pack=job.pack, samples=job.samples
        ):
            shape = part.tokens.inputs.shape
            if shape not in steps:
                group = job.row_group or cached_rows(shape[1])
                parts = row_parts(shape[0], group, jax.device_count())
                steps[shape] = ja.compile_step(make_step(parts), state)
            state, of_step = steps[shape](state, part)
            metrics.append(of_step)
        logged = [{k: float(v) for k, v in x.items()} for x in metrics]
        yield {
            "written": int(np.asarray(rollout.tokens.loss_mask).sum()),
            "prepare": round(prepared - start, 4),
            "kl": logged[0]["objective/kl"],
            "loss": logged[-1]["loss"],
            "positions": int(part.tokens.inputs.size),
            "compiles": sum(step.compiles for step in steps.values()),
        }


RUNS = {"ppo": iterations, "grpo": grouped, "generate": generations}


def main() -> None:
    return_freed_memory()  # as the `jaxalign` command does
    folder = pathlib.Path(sys.argv[1])
    job, out = read_rollouts(folder), folder / "ppo_ours"
    out.mkdir(exist_ok=True)
    model, params = ja.load_pretrained(
        job.policy, mesh=ja.make_mesh(data=-1, fsdp=1), compute_dtype="float32"
    )
    rows = np.arange(job.prompts, dtype=np.int32)
    ids = job.prompt_ids()
    prompts = ja.PromptBatch(ids, np.ones(ids.shape, bool), rows)
    start = time.perf_counter()
    for number, row in enumerate(RUNS[job.what](job, model, params, prompts)):
        now = time.perf_counter()
        append(out / "steps.jsonl", {"step": number, "seconds": round(now - start, 4)} | row)
        start = time.perf_counter()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax")}
    done = {"peak_mib": round(peak_mib(), 1), "versions": versions}
    (out / "done.json").write_text(json.dumps(done) + "\n")


if __name__ == "__main__":
    main()
