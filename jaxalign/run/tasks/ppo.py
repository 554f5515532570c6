"""PPO: a batch of prompts becomes a rollout, cut into epochs × mini-batches of updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms import ppo
from jaxalign.data import prompt_batches, sft_batches, stop_token_ids
from jaxalign.hf import save_pretrained
from jaxalign.models.base import combine
from jaxalign.models.flops import ppo_flops
from jaxalign.parallel.host_memory import on_device, to_host_memory
from jaxalign.parallel.sharding import all_gather_rows, local_rows
from jaxalign.rewards import build_reward
from jaxalign.rewards.cases import shifted
from jaxalign.rewards.model_spec import ModelReward
from jaxalign.run.config.runs import PPORun
from jaxalign.run.export import whole_model
from jaxalign.run.metrics import FLOPS, TOKENS, Stopwatch, to_floats
from jaxalign.run.tasks.actors import start_critic, start_reference
from jaxalign.run.tasks.data import make_data, section_data, total_of
from jaxalign.run.tasks.models import Scorers, load_policy, pad_id
from jaxalign.run.tasks.rollout_log import RolloutDump
from jaxalign.run.tasks.task import Floats, Loop, Task, optimizer, start
from jaxalign.types import RolloutBatch, TrainState


def ppo_task(config: PPORun, mesh: Mesh) -> Task:
    """PPO: a batch of prompts becomes a rollout, cut into epochs × mini-batches of updates."""
    loaded = load_policy(config.model, mesh, config.run.seed)
    reference, ref_params = start_reference(config, loaded, mesh)
    scorers = Scorers(config, mesh, loaded.tok)
    critic, critic_params = start_critic(config, loaded, scorers)
    # Named apart, so that nothing below keeps the weights that the policy starts from.
    model, tok, adapted, options = loaded.model, loaded.tok, bool(loaded.frozen), config.ppo
    apart = config.reference is not None or "reference" in config.mesh.rules_of
    if config.offload_frozen and (apart or not adapted):
        ref_params = to_host_memory(ref_params)
    if not options.stop_tokens:
        stops = stop_token_ids(loaded.tok, config.model.chat_template)
        options = dataclasses.replace(options, stop_tokens=stops)
    if options.pad_token == 0:
        options = dataclasses.replace(options, pad_token=pad_id(loaded.tok))

    batches, held_out = make_data(prompt_batches, config, loaded.tok, mesh)
    total = total_of(config, batches)
    each = config.ppo_epochs * config.minibatches
    critic_optimizer = config.critic_optimizer or config.optimizer
    tx = ppo.make_optimizer(
        optimizer(config.optimizer, max(1, total - config.critic_warmup) * each),
        optimizer(critic_optimizer, total * each) if options.has_critic else None,
        critic_warmup=config.critic_warmup * each,
    )
    both = loaded._replace(
        params=ppo.init_params(loaded.params, critic_params),
        frozen={"policy": loaded.frozen} if loaded.frozen else {},
    )
    step = ppo.make_step(loaded.model, critic, tx, options, micro_batches=config.run.micro_batches)
    # One table of rows for all prompts: training data, then held-out data.
    rows = [*batches.examples, *(held_out.examples if held_out is not None else ())]
    held = scorers.held if config.offload_frozen else scorers.reward
    reward = build_reward(config.reward_specs(), tok, rows=rows, load=held)
    specs = [spec for spec in config.reward_specs() if isinstance(spec, ModelReward)]
    judges = [scorers.reward(spec)[0] for spec in specs]
    watch = Stopwatch()
    watched = watch.around(reward, "rollout", "reward")
    prepare = ppo.make_prepare(
        model,
        critic,
        watched,
        options,
        reference=reference,
        rollout_rules=config.mesh.rules_of.get("rollout"),
    )
    dump = RolloutDump(config.run.folder, tok, config.dump_every, config.dump_samples)
    add_text = _text_adder(config, loaded.tok, mesh)

    def on_train_start(state: TrainState, loop: Loop) -> None:
        if config.calibrate_reward != "none":
            key = jax.random.fold_in(jax.random.key(config.run.seed), 2**31 - 5)
            first = next(iter(batches))
            batches.close()
            loop["calibration"] = list(
                ppo.calibrate(
                    key,
                    reference,
                    jax.jit(on_device)(ref_params),  # it writes answers, not only reads them
                    first,
                    reward,
                    options,
                    config.calibrate_reward,
                )
            )

    def carried(loop: Loop) -> dict[str, Any]:
        return {
            "calibration": tuple(loop["calibration"]),
            "score_stats": ppo.ScoreStats(*loop["score_stats"]),
        }

    def prepare_updates(
        key: jax.Array, state: TrainState, batch: Any, loop: Loop, data: Iterator[Any]
    ) -> tuple[Iterable[RolloutBatch], Floats]:
        sample_key, shuffle_key = jax.random.split(key)
        kl_coef, scale = loop["kl_coef"], carried(loop)

        def answer(number: int, batch: Any) -> tuple[RolloutBatch, Floats]:
            # The first has the plain key, so that runs that take one batch are what they were.
            key = jax.random.fold_in(sample_key, number) if number else sample_key
            watch.start()
            rollout = prepare(key, state, ref_params, batch, kl_coef, **scale)
            jax.block_until_ready(rollout)
            return rollout, watch.stop("experience") | cost(rollout)

        rollout, costs = answer(0, batch)
        metrics = to_floats(ppo.rollout_metrics(rollout, options.samples))
        metrics["kl_coef"] = kl_coef
        answers = int(jnp.sum(rollout.valid))  # pyrefly: ignore[bad-argument-type]
        loop["kl_coef"] = ppo.next_kl_coef(kl_coef, metrics["objective/kl"], options, answers)
        if options.normalize_scores:
            stats = ppo.next_score_stats(ppo.ScoreStats(*loop["score_stats"]), rollout)
            loop["score_stats"] = list(stats)
        loop["iterations"] += 1
        dump.write(loop["iterations"], rollout)
        if config.prompt_draws > 1:
            draws, left = 1, ppo.count_equal_groups(rollout, options.samples)
            while left and draws < config.prompt_draws:
                other, further = answer(draws, next(data))
                rollout, left = ppo.fill_equal_groups(rollout, other, options.samples)
                costs = {name: costs[name] + further[name] for name in costs}
                draws += 1
            metrics |= {"groups/draws": draws, "groups/left_equal": left}
        metrics |= costs
        parts = ppo.minibatches(
            shuffle_key,
            rollout,
            config.ppo_epochs,
            config.minibatches,
            pack=config.pack_updates,
            multiple=config.run.micro_batches,
        )
        return add_text(parts, loop), metrics

    def cost(rollout: RolloutBatch) -> Floats:
        tokens = local_rows(rollout.tokens)
        flops = ppo_flops(
            tokens,
            model,
            critic,
            judges,
            epochs=config.ppo_epochs,
            samples=options.samples,
            frozen=adapted,
            shared_critic=options.shared_critic,
        )
        return {TOKENS: float(np.sum(tokens.segment_ids > 0)), FLOPS: flops.total}

    def evaluate(state: TrainState, loop: Loop) -> Floats:
        # The same key every time: differences come from the policy, not from the draw.
        key = jax.random.fold_in(jax.random.key(config.run.seed), 2**31 - 1)
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        scores: list[float] = []
        for number, batch in enumerate(held_out or ()):
            batch = shifted(batch, len(batches.examples))
            rollout = prepare(
                jax.random.fold_in(key, number), state, ref_params, batch, **carried(loop)
            )
            answered, given = all_gather_rows((rollout.valid, rollout.scores))
            scores += given[answered].tolist()
            figures = to_floats(ppo.rollout_metrics(rollout, options.samples))
            for name, value in figures.items():
                if name in _NO_MEANS:
                    continue
                if name.startswith(("objective/", "response/", "rewards/", "applies/")):
                    part = figures.get(name.replace("rewards/", "applies/", 1), 1.0)
                    count = answered.sum() * (part if name.startswith("rewards/") else 1.0)
                    sums[name] = sums.get(name, 0.0) + value * float(count)
                    counts[name] = counts.get(name, 0.0) + float(count)
        means = {
            name: value / counts[name] if counts[name] else 0.0 for name, value in sums.items()
        }
        return means | {"objective/scores_std": float(np.std(scores))}

    def export(state: TrainState, folder: Any) -> None:
        policy = combine(state.params, state.frozen)["policy"]
        save_pretrained(*whole_model(model, policy), folder, tokenizer=tok)

    limit = config.target_kl
    early_stop = None
    if limit is not None:
        early_stop = lambda logged: float(logged["policy/approxkl_avg"]) > limit  # noqa: E731

    return Task(
        *start(both, tx, step, mesh),
        batches=batches,
        total=total,
        loop={
            "kl_coef": options.kl_coef,
            "iterations": 0,
            "calibration": [0.0, 1.0],
            "score_stats": list(ppo.ScoreStats()),
        },
        prepare_updates=prepare_updates,
        evaluate=evaluate if held_out is not None else None,
        export=export,
        on_train_start=on_train_start,
        early_stop=early_stop,
        async_metrics=False,
    )


# Means over batches say nothing of these.
_NO_MEANS = ("objective/scores_std", "response/length_min", "response/length_max")


def _text_adder(
    config: PPORun, tok: Any, mesh: Mesh
) -> Callable[[Iterable[RolloutBatch], Loop], Iterator[RolloutBatch]]:
    """Gives every mini-batch its rows of text, if there is any; its position goes into `loop`."""
    if config.ptx is None:
        return lambda parts, loop: iter(parts)
    template, seed = config.model.chat_template, config.run.seed
    text, _ = section_data(
        sft_batches, config.ptx, tok, chat_template=template, seed=seed, mesh=mesh
    )
    iterator: list[Iterator[Any]] = []

    def add(parts: Iterable[RolloutBatch], loop: Loop) -> Iterator[RolloutBatch]:
        if not iterator:
            if "ptx" in loop:
                text.set_state(loop["ptx"])
            iterator.append(iter(text))
        for part in parts:
            batch = next(iterator[0])
            loop["ptx"] = text.get_state()
            yield part._replace(ptx=batch)

    return add
