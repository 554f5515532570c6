"""Advantage estimators: per-token rewards → per-token advantages, one small function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithms.ppo.config import Config
from jaxalign.losses import advantages as groups
from jaxalign.losses import ppo as losses
from jaxalign.losses.masked import masked_sum, whiten


class Shaped(NamedTuple):
    """Answers with their shaped rewards.

    Attributes:
      rewards: float32 `[B, T]`, −β·KL at every token and the score at its position.
      reward_mask: bool `[B, T]`, the positions that can have a reward.
      mask: bool `[B, T]`, the answers' tokens.
      valid: bool `[B]`, False for empty rows.
      scores: float32 `[B]`, the scores that the rewards contain.
      reshape: scores `[B]` → the rewards recomputed with these scores.
    """

    rewards: jax.Array
    reward_mask: jax.Array
    mask: jax.Array
    valid: jax.Array
    scores: jax.Array
    reshape: Callable[[jax.Array], jax.Array]


def gae(shaped: Shaped, values: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation from the critic's values `[B, T]`; also the returns."""
    rewards = shaped.rewards
    if config.whiten_rewards:
        rewards = whiten(rewards, shaped.reward_mask, shift_mean=False, ddof=config.whiten_ddof)
    return losses.gae(rewards, values, shaped.reward_mask, gamma=config.gamma, lam=config.lam)


def rloo(shaped: Shaped, config: Config) -> jax.Array:
    """An answer's total reward minus the mean of its prompt's other answers, at every token."""
    totals = masked_sum(shaped.rewards, shaped.reward_mask, axis=1)  # [B, T] -> [B]
    advantages = groups.rloo(totals, shaped.valid, config.samples)
    return jnp.where(shaped.mask, advantages[:, None], 0.0)


def grpo(shaped: Shaped, config: Config) -> jax.Array:
    """An answer's total reward, normalised over its prompt's answers, at every token."""
    totals = masked_sum(shaped.rewards, shaped.reward_mask, axis=1)  # [B, T] -> [B]
    advantages = groups.grpo(
        totals, shaped.valid, config.samples, scale=config.scale_rewards, ddof=config.whiten_ddof
    )
    return jnp.where(shaped.mask, advantages[:, None], 0.0)


def reinforce(shaped: Shaped, config: Config) -> jax.Array:
    """REINFORCE++: the discounted sum of this and later rewards."""
    return groups.rewards_to_go(shaped.rewards, shaped.reward_mask, gamma=config.gamma)


def reinforce_baseline(shaped: Shaped, config: Config) -> jax.Array:
    """REINFORCE++ with scores centred in their group before they become rewards."""
    centred = groups.grpo(shaped.scores, shaped.valid, config.samples, scale="none")
    rewards = shaped.reshape(centred)
    return groups.rewards_to_go(rewards, shaped.reward_mask, gamma=config.gamma)


CRITIC_FREE: dict[str, Callable[[Shaped, Config], jax.Array]] = {
    "rloo": rloo,
    "grpo": grpo,
    "reinforce++": reinforce,
    "reinforce++_baseline": reinforce_baseline,
}
"""`advantage_estimator` → advantages `[B, T]`; "gae", which has a critic, also returns returns."""
