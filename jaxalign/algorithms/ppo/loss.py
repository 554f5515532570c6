"""PPO's loss: the sum of separate losses for policy, critic and text.

    L = policy + c_v · value + c_ptx · (−log π(text))

The policy's loss holds the clipped objective, an entropy bonus and, with `kl_in="loss"`, a KL term.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxalign.algorithms.loss import (
    Figures,
    HiddenLoss,
    Loss,
    Sums,
    Terms,
    add_losses,
    join_losses,
    with_model_terms,
)
from jaxalign.algorithms.ppo.config import Config
from jaxalign.algorithms.ppo.rows import at_columns, columns_of, value_mask_of
from jaxalign.losses import aggregate as averages
from jaxalign.losses import ppo as losses
from jaxalign.losses.masked import keep, weighted
from jaxalign.losses.sft import nll
from jaxalign.models.base import LanguageModel, ScalarModel
from jaxalign.models.lm_head import target_logprobs, target_sum
from jaxalign.types import LowerStates, Params, RolloutBatch, TokenBatch, Weighted


def make_loss(
    model: LanguageModel, critic: ScalarModel | None, config: Config | None = None
) -> Loss:
    """The PPO loss: `policy` is averaged by `loss_aggregation`, `value` over value positions.

    If there is `ptx` text, `ptx` is averaged over its tokens.
    """
    config = Config() if config is None else config
    config.check_critic(critic)
    policy = policy_loss(model, config)
    if critic is None:
        loss = with_model_terms(policy, model, part="policy")
    elif config.shared_critic:
        both = join_losses(policy, value_loss(critic, config))
        loss = with_model_terms(both, model, part="policy")
    else:
        loss = add_losses(
            with_model_terms(policy, model, part="policy"),
            with_model_terms(value_loss(critic, config), critic, part="critic", prefix="critic_"),
        )
    if config.ptx_coef:
        loss = add_losses(loss, with_model_terms(ptx_loss(model, config), model, part="policy"))
    return loss


# The policy.


def policy_loss(model: LanguageModel, config: Config) -> HiddenLoss:
    """`policy`: the clipped objective, less the entropy bonus, plus the KL term."""

    def count(batch: RolloutBatch) -> Sums:
        weight = averages.aggregate_weight(
            batch.tokens, config.loss_aggregation, config.max_new_tokens
        )
        return {"policy": weight}

    def terms(params: Params, hidden: jax.Array, batch: RolloutBatch) -> Terms:
        batch = at_columns(batch)
        tokens = batch.tokens
        # Stored per row, with equal values: micro-batches split every array of the batch by rows.
        temperature = batch.temperature
        temperature = config.temperature if temperature is None else jnp.max(temperature)
        kl_coef = config.kl_coef if batch.kl_coef is None else jnp.max(batch.kl_coef)
        logprobs, entropy = target_logprobs(
            model,
            params["policy"],
            hidden,
            tokens.targets,
            temperature,
            entropy=True,
            entropy_gradient=config.entropy_coef != 0,
            mask=tokens.loss_mask,
        )
        return _policy_terms(logprobs, entropy, kl_coef, batch, config)

    return HiddenLoss(lambda batch: batch.tokens, count, terms, columns=columns_of)


def _policy_terms(
    logprobs: jax.Array,
    entropy: jax.Array,
    kl_coef: jax.Array | float,
    batch: RolloutBatch,
    config: Config,
) -> Terms:
    """From log π and entropies of the new policy, both `[B, T]`."""
    tokens, mask = batch.tokens, batch.tokens.loss_mask

    def averaged(x: jax.Array) -> Weighted:
        return averages.aggregate(x, tokens, config.loss_aggregation, config.max_new_tokens)

    # Mask before the arithmetic: a NaN in padding must not reach a gradient.
    new, old = keep(logprobs, mask), keep(batch.old_logprobs, mask)
    ref, advantages = keep(batch.ref_logprobs, mask), keep(batch.advantages, mask)
    log_ratio = new - old
    if config.importance_sampling_level == "sequence":
        log_ratio = averages.answer_mean(log_ratio, tokens)
    clipped = _clipped_objective(log_ratio, advantages, config)
    loss, kl_metric = clipped, {}
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy
    if config.kl_in == "loss":
        kl = losses.kl(new, ref, config.kl_estimator)
        loss = loss + kl_coef * kl
        kl_metric = {"loss/kl_avg": averaged(kl)}
    total = averaged(loss).total
    ratio = jnp.exp(jnp.clip(log_ratio, -losses.MAX_LOG_RATIO, losses.MAX_LOG_RATIO))
    metrics = {
        "loss/policy_avg": averaged(clipped),
        "policy/approxkl_avg": weighted(0.5 * jnp.square(new - old), mask),
        "policy/clipfrac_avg": weighted(clipped > -advantages * ratio, mask),
        "policy/entropy_avg": weighted(entropy, mask),
        "val/ratio": weighted(ratio, mask),
        "val/ratio_var": weighted(jnp.square(ratio - 1), mask),
    }
    return Terms({"policy": total}, metrics | kl_metric)


def _clipped_objective(log_ratio: jax.Array, advantages: jax.Array, config: Config) -> jax.Array:
    """max(−A ρ, −A clip(ρ, 1−ε, 1+ε)), `[B, T]`."""
    # Pass the log-ratio against 0: added to log π_old and subtracted again it would be rounded.
    return losses.policy_loss(
        log_ratio,
        jnp.zeros_like(log_ratio),
        advantages,
        clip_range=config.clip_range,
        clip_range_high=config.clip_range_high,
        dual_clip=config.dual_clip,
    )


# The critic.


def value_loss(critic: ScalarModel, config: Config) -> HiddenLoss:
    """`value`: c_v · ½ max((V−R)², (clip(V)−R)²)."""

    def count(batch: RolloutBatch) -> Sums:
        return {"value": jnp.sum(value_mask_of(batch), dtype=jnp.float32)}

    def terms(params: Params, hidden: jax.Array, batch: RolloutBatch) -> Terms:
        values = critic.scores(params["critic"], hidden)
        average, metrics = _value_terms(values, at_columns(batch), config)
        return Terms({"value": config.vf_coef * average.total}, metrics)

    def tokens(batch: RolloutBatch) -> TokenBatch:
        # A separate critic has its own routers, and its own lower layers or the policy's.
        lower = batch.critic_lower
        if isinstance(lower, LowerStates) and lower.hidden is None:
            lower = batch.tokens.lower
        return batch.tokens._replace(experts=None, lower=lower)

    return HiddenLoss(tokens, count, terms, columns=columns_of)


def _value_terms(
    values: jax.Array, batch: RolloutBatch, config: Config
) -> tuple[Weighted, Figures]:
    if batch.old_values is None or batch.returns is None:
        raise ValueError("the rollout has no old_values and returns; prepare it with the critic")
    mask = value_mask_of(batch)
    values, old, returns = (keep(x, mask) for x in (values, batch.old_values, batch.returns))
    limit = config.clip_range_value
    value_losses = losses.value_loss(values, old, returns, clip_range_value=limit)
    # A value within the bounds is unchanged to the last bit: rounding is not clipping.
    near = values if limit is None else jnp.clip(values, old - limit, old + limit)
    clipped = jnp.square(near - returns) > jnp.square(values - returns)
    average = weighted(value_losses, mask)
    return average, {"loss/value_avg": average, "val/clipfrac_avg": weighted(clipped, mask)}


# Text beside the rollout.


def ptx_loss(model: LanguageModel, config: Config) -> HiddenLoss:
    """`ptx`: c_ptx · −log π of pre-training text, without the rollout's temperature."""

    def count(batch: RolloutBatch) -> Sums:
        text = _text(batch)
        return {"ptx": weighted(text.loss_mask, text.loss_mask, text.weights).weight}

    def terms(params: Params, hidden: jax.Array, batch: RolloutBatch) -> Terms:
        text = _text(batch)
        target = target_sum(
            model, params["policy"], hidden, text.targets, text.loss_mask, weights=text.weights
        )
        average = weighted(nll(target.logprobs), text.loss_mask, text.weights)
        metrics = {"loss/ptx_avg": average}
        return Terms({"ptx": -config.ptx_coef * target.total}, metrics)

    return HiddenLoss(_text, count, terms, token_weights=True)


def _text(batch: RolloutBatch) -> TokenBatch:
    if batch.ptx is None:
        raise ValueError("ppo ptx_coef > 0 and no text; wanted batch._replace(ptx=TokenBatch)")
    return batch.ptx
