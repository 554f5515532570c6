"""The half of PPO's `prepare` that follows sampling and scoring: from answers to advantages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.algorithms.prepare import Prepare
from jaxalign.losses import advantages as groups
from jaxalign.losses import ppo as losses
from jaxalign.losses.masked import masked_sum, whiten
from jaxalign.models.base import LanguageModel, ScalarModel, combine, read
from jaxalign.models.lm_head import target_logprobs
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, reshard_batch, use_mesh
from jaxalign.types import Array, Params, RolloutBatch, TokenBatch, TrainState

if TYPE_CHECKING:
    from jaxalign.algorithms.ppo import Config


def make_experience(
    model: LanguageModel,
    critic: ScalarModel | None,
    config: Config,
    *,
    reference: LanguageModel | None = None,
) -> Prepare[..., RolloutBatch]:
    """Builds the half of `prepare` that follows sampling and scoring, jitted; takes any answers.

    Args:
      model: the policy.
      critic: value model; None where the advantages need none.
      config: options.
      reference: the model of `ref_params`; None: the policy's. Its parameters may lie on other
        devices than the policy's.

    Returns:
      `experience(state, ref_params, tokens, scores, finished, sampler_logprobs, kl_coef=None,
      temperature=None, score_scale=None) -> RolloutBatch`: `tokens` are prompts with their answers
      `[B, T]` as `join_tokens` makes them, `scores` and `finished` `[B]`, `sampler_logprobs`
      `[B, T]` aligned with targets. `kl_coef` and `temperature` take the place of the configured
      ones; with `score_scale = (shift, scale)` the rewards are made of (score − shift) / scale. The
      rollout has T − 1 columns: the last one of a row predicts nothing.
    """
    config.check_critic(critic)
    other = model if reference is None else reference

    def logprobs_under(
        which: LanguageModel, weights: Params, tokens: TokenBatch, heat: Array | float
    ) -> tuple[jax.Array, jax.Array]:
        mask = tokens.loss_mask
        hidden, _ = read(which, weights, tokens)
        logprobs = target_logprobs(which, weights, hidden, tokens.targets, heat, mask=mask)
        return jnp.where(mask, logprobs, 0.0), hidden

    @jax.jit
    def asked(ref_params: Params, tokens: TokenBatch, heat: Array) -> jax.Array:
        tokens = jax.tree.map(lambda x: x[:, :-1], tokens)
        return logprobs_under(other, on_device(ref_params), tokens, heat)[0]

    @jax.jit
    def experience(
        state: TrainState,
        ref_params: Params | None,
        tokens: TokenBatch,
        scores: Array,
        finished: Array,
        sampler_logprobs: Array,
        kl_coef: Array | None = None,
        temperature: Array | None = None,
        score_scale: tuple[Array, Array] | None = None,
        ref_logprobs: Array | None = None,
    ) -> RolloutBatch:
        tokens, sampler_logprobs = jax.tree.map(lambda x: x[:, :-1], (tokens, sampler_logprobs))
        params = combine(state.params, state.frozen)
        mask = tokens.loss_mask
        valid = jnp.any(mask, axis=1)
        heat = config.temperature if temperature is None else temperature
        coef = config.kl_coef if kl_coef is None else kl_coef

        old_logprobs, hidden = logprobs_under(model, params["policy"], tokens, heat)
        if ref_logprobs is None:
            ref_logprobs, _ = logprobs_under(other, on_device(ref_params or {}), tokens, heat)
        scores = losses.missing_eos_penalty(scores, finished, config.missing_eos_penalty)
        scaled = scale_scores(scores, score_scale, config.reward_clip)
        token_kl = losses.kl(old_logprobs, ref_logprobs, config.kl_estimator)

        def rewards_of(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
            return losses.token_rewards(
                token_kl,
                scores,
                mask,
                kl_coef=coef if config.kl_in == "reward" else 0.0,
                score_at=config.score_at,
            )

        rewards, value_mask = rewards_of(scaled)
        # Answers that leave the loss; their scores stay in the baseline of their group.
        trained = mask
        if config.mask_truncated:
            trained &= jnp.asarray(finished, bool)[:, None]
        if config.skip_equal_groups:
            trained &= ~groups.equal_groups(scores, valid, config.samples)[:, None]
        values = returns = None
        if critic is not None:
            seen = rewards
            if config.whiten_rewards:
                seen = whiten(rewards, value_mask, shift_mean=False, ddof=config.whiten_ddof)
            if not config.shared_critic:
                hidden, _ = read(critic, params["critic"], tokens)
            values = critic.scores(params["critic"], hidden)
            advantages, returns = losses.gae(
                seen, values, value_mask, gamma=config.gamma, lam=config.lam
            )
        elif config.advantage_estimator in ("rloo", "grpo"):
            totals = masked_sum(rewards, value_mask, axis=1)
            if config.advantage_estimator == "rloo":
                each = groups.rloo(totals, valid, config.samples)
            else:
                scale, ddof = config.scale_rewards, config.whiten_ddof
                each = groups.grpo(totals, valid, config.samples, scale=scale, ddof=ddof)
            advantages = jnp.where(mask, each[:, None], 0.0)
        else:
            if config.advantage_estimator == "reinforce++_baseline":
                centred = groups.grpo(scaled, valid, config.samples, scale="none")
                rewards_to_learn, _ = rewards_of(centred)
            else:
                rewards_to_learn = rewards
            advantages = groups.rewards_to_go(rewards_to_learn, value_mask, gamma=config.gamma)
        if config.whitens:
            advantages = whiten(advantages, trained, ddof=config.whiten_ddof)

        def everywhere(x: Array | None) -> jax.Array | None:
            return None if x is None else jnp.full(valid.shape, x, jnp.float32)

        filters = config.mask_truncated or config.skip_equal_groups
        # A row's critic is trained where its policy is, and one position after it.
        kept = value_mask & jnp.any(trained, axis=1, keepdims=True)
        return RolloutBatch(
            tokens=tokens._replace(loss_mask=trained),
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            old_values=None if values is None else jnp.where(value_mask, values, 0.0),
            advantages=jnp.where(trained, advantages, 0.0),
            returns=returns,
            value_mask=kept,
            rewards=rewards,
            scores=scores,
            sampler_logprobs=sampler_logprobs,
            finished=finished,
            valid=valid,
            answer_mask=mask if filters else None,
            scaled_scores=None if scaled is scores else scaled,
            temperature=everywhere(temperature),
            kl_coef=everywhere(kl_coef) if config.kl_in == "loss" else None,
        )

    def anywhere(
        state: TrainState,
        ref_params: Params,
        tokens: TokenBatch,
        scores: Array,
        finished: Array,
        sampler_logprobs: Array,
        kl_coef: Array | None = None,
        temperature: Array | None = None,
        score_scale: tuple[Array, Array] | None = None,
    ) -> RolloutBatch:
        here, there = mesh_of(state.params), mesh_of(ref_params)
        rest = (tokens, scores, finished, sampler_logprobs, kl_coef, temperature, score_scale)
        if here is None or there is None or here == there:
            return experience(state, ref_params, *rest)
        heat = jnp.asarray(config.temperature if temperature is None else temperature)
        with use_mesh(there):
            said = asked(ref_params, reshard_batch(tokens, there), np.asarray(heat))
        return experience(state, None, *rest, reshard_batch(said, here))

    def lower(state: TrainState, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        with use_mesh(mesh_of(state.params)):
            return experience.lower(state, *args, **kwargs)

    return Prepare(anywhere, lower)


def scale_scores(
    scores: jax.Array, score_scale: tuple[Any, Any] | None, clip: float | None
) -> jax.Array:
    """(score − shift) / scale, then cut to ± `clip`; without either the scores themselves."""
    if score_scale is not None:
        scores = (scores - score_scale[0]) / score_scale[1]
    return scores if clip is None else jnp.clip(scores, -clip, clip)
