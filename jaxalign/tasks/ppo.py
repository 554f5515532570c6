"""PPO: a batch of prompts becomes a rollout, cut into epochs × mini-batches of updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms import ppo
from jaxalign.config import PPORun
from jaxalign.data import prompt_batches, stop_token_ids
from jaxalign.hf import save_pretrained
from jaxalign.metrics import to_floats
from jaxalign.rewards import model_reward
from jaxalign.sharding import all_rows
from jaxalign.tasks.data import make_data, total_of
from jaxalign.tasks.loading import (
    check_vocabulary,
    language_model,
    load_policy,
    load_scorer,
    pad_id,
    shape_of,
)
from jaxalign.tasks.task import Floats, Loop, Task, optimizer, start
from jaxalign.types import RolloutBatch, TrainState


def ppo_task(config: PPORun, mesh: Mesh) -> Task:
    """PPO: a batch of prompts becomes a rollout, cut into epochs × mini-batches of updates."""
    loaded = load_policy(config.model, mesh, config.run.seed)
    if config.reference is None:
        ref_params = loaded.params
    else:
        reference, ref_params = language_model(config.reference, config.model, mesh)
        if shape_of(reference) != shape_of(loaded.model):
            raise ValueError(
                f"reference={config.reference!r} has another shape than the policy "
                f"{config.model.source!r}; wanted the model that the policy started from"
            )
    scorer, rm_params = load_scorer(config.reward_model, config, mesh)
    check_vocabulary(loaded.tok, scorer, config.reward_model)
    if config.critic is None:
        critic, critic_params = scorer, rm_params
    else:
        critic, critic_params = load_scorer(config.critic, config, mesh, critic=True)
        check_vocabulary(loaded.tok, critic, config.critic)
    if config.critic_head == "zero":
        head = jax.tree.map(jnp.zeros_like, critic_params["score"])
        critic_params = critic_params | {"score": head}
    options = config.ppo
    if not options.stop_tokens:
        stops = stop_token_ids(loaded.tok, config.model.chat_template)
        options = dataclasses.replace(options, stop_tokens=stops)
    if options.pad_token == 0:
        options = dataclasses.replace(options, pad_token=pad_id(loaded.tok))

    batches, held_out = make_data(prompt_batches, config, loaded.tok, mesh)
    total = total_of(config, batches)
    updates = total * config.ppo_epochs * config.minibatches
    policy_optimizer = config.optimizer
    critic_optimizer = config.critic_optimizer or policy_optimizer
    tx = ppo.make_optimizer(
        optimizer(policy_optimizer, updates), optimizer(critic_optimizer, updates)
    )
    both = loaded._replace(params=ppo.init_params(loaded.params, critic_params))
    step = ppo.make_step(loaded.model, critic, tx, options, micro_batches=config.run.micro_batches)
    prepare = ppo.make_prepare(loaded.model, critic, model_reward(scorer, rm_params), options)

    def expand(
        key: jax.Array, state: TrainState, batch: Any, loop: Loop
    ) -> tuple[Iterable[RolloutBatch], Floats]:
        sample_key, shuffle_key = jax.random.split(key)
        rollout = prepare(sample_key, state, ref_params, batch, loop["kl_coef"])
        metrics = to_floats(ppo.rollout_metrics(rollout)) | {"kl_coef": loop["kl_coef"]}
        answers = int(jnp.sum(rollout.valid))  # pyrefly: ignore[bad-argument-type]
        loop["kl_coef"] = ppo.next_kl_coef(
            loop["kl_coef"], metrics["objective/kl"], options, answers
        )
        parts = ppo.minibatches(shuffle_key, rollout, config.ppo_epochs, config.minibatches)
        return parts, metrics

    def evaluate(state: TrainState) -> Floats:
        # The same key every time: differences come from the policy, not from the draw.
        key = jax.random.fold_in(jax.random.key(config.run.seed), 2**31 - 1)
        sums: dict[str, float] = {}
        scores: list[float] = []
        for number, batch in enumerate(held_out or ()):
            rollout = prepare(jax.random.fold_in(key, number), state, ref_params, batch)
            answered, given = all_rows((rollout.valid, rollout.scores))
            scores += given[answered].tolist()
            for name, value in to_floats(ppo.rollout_metrics(rollout)).items():
                if name.startswith(("objective/", "response/")):
                    sums[name] = sums.get(name, 0.0) + value * int(answered.sum())
        means = {name: value / len(scores) for name, value in sums.items()}
        return means | {"objective/scores_std": float(np.std(scores))}

    def export(state: TrainState, folder: Any) -> None:
        save_pretrained(loaded.model, state.params["policy"], folder, tokenizer=loaded.tok)

    return Task(
        *start(both, tx, step, mesh),
        batches=batches,
        total=total,
        loop={"kl_coef": options.kl_coef},
        expand=expand,
        evaluate=evaluate if held_out is not None else None,
        export=export,
    )
