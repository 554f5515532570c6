"""Reward models: every batch of judged answers is one update."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxalign.algorithms import reward
from jaxalign.algorithms.compile import compile_step
from jaxalign.data import (
    Batches,
    graded_batches,
    preference_batches,
    ranked_batches,
    step_batches,
)
from jaxalign.run.config.reward import RewardRun
from jaxalign.run.tasks.evaluate import RewardEvaluator
from jaxalign.run.tasks.loader import Loader
from jaxalign.run.tasks.models import load_trained_scorer
from jaxalign.run.tasks.parts import Parts, RunData, scheduled_optimizer, with_guard
from jaxalign.run.tasks.shapes import array, pair_shapes, token_shapes
from jaxalign.run.tasks.task import Task, updates_task
from jaxalign.types import GradedBatch, RankedBatch, StepBatch, TrainState

RANKED_ANSWERS = 4
"""The number of answers per prompt to assume before the data is read."""


def judged_batches(config: RewardRun) -> Callable[..., Batches[Any]]:
    """The function that makes the objective's batches."""
    if config.reward.objective == "regression":
        return functools.partial(graded_batches, attributes=config.reward.attributes)
    if config.reward.objective == "ranking":
        return functools.partial(ranked_batches, answers=config.answers)
    return step_batches if config.reward.objective == "steps" else preference_batches


def judged_shapes(config: RewardRun) -> Any:
    """A batch of the objective as shapes."""
    rows, tokens = config.data.rows, token_shapes(config.data)
    if config.reward.objective == "ranking":
        answers = RANKED_ANSWERS if config.answers is None else config.answers
        several = jax.tree.map(lambda x: array(rows, answers, x.shape[1], dtype=x.dtype), tokens)
        return RankedBatch(several, array(rows, answers), array(rows, answers, dtype=jnp.bool_))
    if config.reward.objective == "regression":
        grades = (rows, len(config.reward.attributes))
        return GradedBatch(tokens, array(*grades), array(*grades, dtype=jnp.bool_))
    if config.reward.objective == "steps":
        return StepBatch(tokens, array(*tokens.inputs.shape), tokens.loss_mask)
    return pair_shapes(config)


def build_reward_model(
    config: RewardRun, mesh: Mesh, loader: Loader, data: RunData
) -> tuple[TrainState, Parts]:
    """The parts of a reward model's run."""
    policy = load_trained_scorer(config, mesh, loader, data.tok)
    tx = with_guard(scheduled_optimizer(config.optimizer, data.total), config.run)
    step = reward.make_step(
        policy.model,
        tx,
        config.reward,
        micro_batches=config.run.micro_batches,
        sources=data.sources,
    )
    state = loader.init_state(policy.params, tx, policy.frozen)
    return state, Parts(
        policy=policy.model,
        adapted=bool(policy.frozen),
        step=compile_step(step, state, mesh),
    )


def reward_task(
    config: RewardRun, mesh: Mesh, state: TrainState, parts: Parts, data: RunData
) -> Task:
    """Every batch of judged answers is one update; held-out scores are evaluated all at once."""
    task = updates_task(config, mesh, state, parts, data)
    if data.held_out is None:
        return task
    evaluator = RewardEvaluator(parts.policy, config.reward, data.held_out, mesh)
    return task._replace(evaluate=lambda state, loop: evaluator(state), details=evaluator.details)
