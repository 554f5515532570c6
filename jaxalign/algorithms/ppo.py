"""Proximal policy optimisation against a reward, with a critic, under a KL leash.

    r_t = score·[t = last] − β · kl_t                                  shaped reward of a token
    A_t = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V_{t+1} − V_t             advantage
    L   = E[max(−A ρ, −A clip(ρ, 1−ε, 1+ε))] + c_v · ½ E[max((V−R)², (clip(V)−R)²)]

with ρ_t = π(y_t|·)/π_old(y_t|·) (Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for
language models: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Huang et al. 2024,
https://arxiv.org/abs/2403.17031). Four models: policy and critic are trained; the frozen reference
and the reward act in `prepare`, which samples answers, scores them and computes advantages, once
an iteration. `minibatches` then cuts the rollout up for several epochs of steps.

State: `TrainState` with `params = {"policy": …, "critic": …}`. Batch: `RolloutBatch`, `[B, T]`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxalign.algorithms.rollout import (
    join_tokens,
    logprob_difference,
    minibatches,
    rollout_metrics,
    value_mask_of,
)
from jaxalign.algorithms.step import Loss, Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.generate import sample
from jaxalign.losses import ppo as losses
from jaxalign.masked import weighted, whiten
from jaxalign.models.base import LanguageModel, ScalarModel, combine
from jaxalign.models.heads import target_logprobs
from jaxalign.sharding import local_rows, mesh_of, on_mesh, shard_batch
from jaxalign.types import (
    Array,
    Params,
    PromptBatch,
    RolloutBatch,
    TokenBatch,
    TrainState,
    Weighted,
)

__all__ = [
    "Config",
    "RewardFn",
    "init_params",
    "join_tokens",
    "make_experience",
    "make_loss",
    "make_optimizer",
    "make_prepare",
    "make_step",
    "minibatches",
    "next_kl_coef",
    "rollout_metrics",
]

_join = jax.jit(join_tokens)

RewardFn = Callable[[TokenBatch, PromptBatch], Array]
"""(prompts with their answers, the prompts) → float scores `[B]`; see `jaxalign.rewards`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PPO. Names as in TRL's PPOConfig where it has them.

    Attributes:
      max_new_tokens: longest answer.
      stop_tokens: ids that end an answer.
      pad_token: id written after the end; may be any id, masks do not read it.
      temperature: divides the logits of policy, reference and rollout alike; > 0.
      top_k, top_p: rollout filters, off (0 and 1) by default: they make the sampler differ from
        the distribution whose log-probabilities are trained.
      kl_coef: β ≥ 0.
      kl_estimator: "k1", "k2" or "k3".
      kl_in: "reward" (shaped into the rewards) or "loss" (a term of its own).
      kl_target: if set, β is adapted to keep this KL (nats an answer), see `losses.ppo`.
      kl_horizon: answers over which the controller acts.
      gamma, lam: γ and λ of the advantage estimate.
      clip_range, clip_range_high, dual_clip: bounds of the ratio, see `losses.ppo.policy_loss`.
      clip_range_value: bound of the critic's move, None for none.
      vf_coef: c_v, weight of the critic's loss.
      entropy_coef: weight of the entropy bonus; 0 is off.
      whiten_advantages: normalise advantages over the answers' tokens of the whole rollout.
      whiten_rewards: divide rewards by their standard deviation, keeping the mean.
      whiten_ddof: 0 for the biased variance, 1 for the unbiased.
      score_at: "eos" (last token of the answer) or "after_eos" (the position after, as TRL).
      missing_eos_penalty: subtracted from the score of an answer without stop token; ≥ 0.
      logprob_tolerance: largest mean |sampler − trainer| log-probability difference, nats a token,
        before `prepare` stops the run.
    """

    max_new_tokens: int = 64
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    gamma: float = 1.0
    lam: float = 0.95
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    clip_range_value: float | None = 0.2
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    whiten_advantages: bool = True
    whiten_rewards: bool = False
    whiten_ddof: int = 0
    score_at: str = "eos"
    missing_eos_penalty: float = 0.0
    logprob_tolerance: float = 0.05

    def __post_init__(self):
        def want(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"ppo {name}={getattr(self, name)!r}: wanted {wanted}")

        want(self.max_new_tokens >= 1, "max_new_tokens", "a positive integer")
        want(self.temperature > 0, "temperature", "a positive number (sampling, not greedy)")
        want(self.top_k >= 0, "top_k", "0 (off) or a positive integer")
        want(0 < self.top_p <= 1, "top_p", "a value in (0, 1]")
        want(self.kl_coef >= 0, "kl_coef", "0 or more")
        want(self.kl_in in ("reward", "loss"), "kl_in", '"reward" or "loss"')
        want(self.kl_target is None or self.kl_target > 0, "kl_target", "a positive number")
        want(
            self.kl_target is None or self.kl_in == "reward", "kl_target", 'None with kl_in="loss"'
        )
        want(self.kl_horizon > 0, "kl_horizon", "a positive number")
        want(0 <= self.gamma <= 1, "gamma", "a value in [0, 1]")
        want(0 <= self.lam <= 1, "lam", "a value in [0, 1]")
        want(self.vf_coef >= 0, "vf_coef", "0 or more")
        want(self.whiten_ddof in (0, 1), "whiten_ddof", "0 or 1")
        want(self.missing_eos_penalty >= 0, "missing_eos_penalty", "0 or more")
        want(self.logprob_tolerance > 0, "logprob_tolerance", "a positive number")
        known = losses.KL_ESTIMATORS
        want(self.kl_estimator in known, "kl_estimator", f"one of {', '.join(known)}")
        losses.check_score_at(self.score_at)
        losses.check_clip(self.clip_range, self.clip_range_high, self.dual_clip)
        losses.check_clip_value(self.clip_range_value)


def init_params(policy_params: Params, critic_params: Params) -> Params:
    """The trained parameters of PPO, for `init_state`: `{"policy": …, "critic": …}`."""
    return {"policy": policy_params, "critic": critic_params}


def make_optimizer(
    policy_tx: optax.GradientTransformation, critic_tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """One optimizer out of two: policy and critic with their own rates and gradient clipping."""
    return optax.partition(
        {"policy": policy_tx, "critic": critic_tx},
        lambda params: {
            part: jax.tree.map(lambda _, part=part: part, tree) for part, tree in params.items()
        },
    )


def make_experience(
    model: LanguageModel, critic: ScalarModel, config: Config | None = None
) -> Callable[..., RolloutBatch]:
    """Builds the half of `prepare` that follows sampling and scoring, jitted; takes any answers.

    Args:
      model: policy and reference.
      critic: value model.
      config: options.

    Returns:
      `experience(state, ref_params, tokens, scores, finished, sampler_logprobs, kl_coef=None)
      -> RolloutBatch`: `tokens` are prompts with their answers `[B, T]` as `join_tokens` makes
      them, `scores` and `finished` `[B]`, `sampler_logprobs` `[B, T]` aligned with targets. The
      rollout has T − 1 columns: the last one of a row predicts nothing.
    """
    config = Config() if config is None else config

    @jax.jit
    def experience(
        state: TrainState,
        ref_params: Params,
        tokens: TokenBatch,
        scores: Array,
        finished: Array,
        sampler_logprobs: Array,
        kl_coef: Array | None = None,
    ) -> RolloutBatch:
        tokens, sampler_logprobs = jax.tree.map(lambda x: x[:, :-1], (tokens, sampler_logprobs))
        params = combine(state.params, state.frozen)
        mask = tokens.loss_mask
        read = (tokens.inputs, tokens.positions, tokens.segment_ids)

        def logprobs_under(weights: Params) -> jax.Array:
            hidden = model.apply(weights, *read)
            logprobs = target_logprobs(
                model, weights, hidden, tokens.targets, config.temperature, mask=mask
            )
            return jnp.where(mask, logprobs, 0.0)

        old_logprobs = logprobs_under(params["policy"])
        ref_logprobs = logprobs_under(ref_params)
        values = critic.scores(params["critic"], critic.apply(params["critic"], *read))
        scores = losses.missing_eos_penalty(scores, finished, config.missing_eos_penalty)
        in_reward = config.kl_in == "reward"
        coef = config.kl_coef if kl_coef is None else kl_coef
        rewards, value_mask = losses.token_rewards(
            losses.kl(old_logprobs, ref_logprobs, config.kl_estimator),
            scores,
            mask,
            kl_coef=coef if in_reward else 0.0,
            score_at=config.score_at,
        )
        seen = rewards
        if config.whiten_rewards:
            seen = whiten(rewards, value_mask, shift_mean=False, ddof=config.whiten_ddof)
        advantages, returns = losses.gae(
            seen, values, value_mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            advantages = whiten(advantages, mask, ddof=config.whiten_ddof)
        return RolloutBatch(
            tokens=tokens,
            old_logprobs=old_logprobs,
            ref_logprobs=ref_logprobs,
            old_values=jnp.where(value_mask, values, 0.0),
            advantages=jnp.where(mask, advantages, 0.0),
            returns=returns,
            value_mask=value_mask,
            rewards=rewards,
            scores=scores,
            sampler_logprobs=sampler_logprobs,
            finished=finished,
            valid=jnp.any(mask, axis=1),
        )

    return experience


def make_prepare(
    model: LanguageModel,
    critic: ScalarModel,
    reward_fn: RewardFn,
    config: Config | None = None,
) -> Callable[..., RolloutBatch]:
    """Builds `prepare(key, state, ref_params, prompts, kl_coef=None) -> RolloutBatch`.

    One iteration's experience: answers sampled from the policy, scores from `reward_fn`, per-token
    KL against the frozen reference, values, advantages and returns. The policy's and critic's
    weights are used where they lie, not copied.

    Args:
      model: policy and reference.
      critic: value model.
      reward_fn: gives every answer a finite score; runs outside jit, so that it may be any Python.
      config: options.

    Returns:
      `prepare`; `kl_coef` overrides the configured one (adaptive controller). It raises
      ValueError where a score is not finite, and where the sampler's log-probabilities differ from
      the trainer's by more than `logprob_tolerance` on average.
    """
    config = Config() if config is None else config
    if config.missing_eos_penalty and not config.stop_tokens:
        raise ValueError(
            f"ppo missing_eos_penalty={config.missing_eos_penalty} without stop_tokens: every "
            "answer would be unfinished; set stop_tokens, or the penalty to 0"
        )
    experience = make_experience(model, critic, config)

    def prepare(
        key: jax.Array,
        state: TrainState,
        ref_params: Params,
        prompts: PromptBatch,
        kl_coef: float | Array | None = None,
    ) -> RolloutBatch:
        mesh = mesh_of(state.params)
        if mesh is not None:
            prompts = shard_batch(prompts, mesh)
        answers = sample(
            model,  # pyrefly: ignore[bad-argument-type]
            combine(state.params, state.frozen)["policy"],
            prompts,
            key,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            stop_tokens=config.stop_tokens,
            pad_token=config.pad_token,
        )
        kl_coef = jnp.asarray(config.kl_coef if kl_coef is None else kl_coef, jnp.float32)
        with on_mesh(mesh):
            tokens = _join(prompts, answers, config.pad_token)
            # Of this host's rows, which is all a reward in Python has to know of.
            answered = local_rows(jnp.any(answers.mask, axis=1), mesh)
            scores = _finite(local_rows(reward_fn(tokens, prompts), mesh), answered)
            # The sampler's log-probabilities are aligned with targets: shifted by one, once.
            blank = jnp.zeros((answers.tokens.shape[0], prompts.tokens.shape[1] - 1))
            end = jnp.zeros((answers.tokens.shape[0], 1))
            recorded = jnp.concatenate([blank, answers.logprobs, end], axis=1)
            if mesh is not None:
                recorded, scores = shard_batch((recorded, scores), mesh)
            rollout = experience(
                state, ref_params, tokens, scores, answers.finished, recorded, kl_coef
            )
            mask = rollout.tokens.loss_mask
            # The experience has one column less: nothing follows the last one.
            gap, _ = logprob_difference(rollout.old_logprobs, recorded[:, : mask.shape[1]], mask)
            difference = float(gap)
        if not difference <= config.logprob_tolerance:
            raise ValueError(
                f"sampler and trainer log-probabilities differ by {difference:.3g} nats a token "
                f"on average; wanted at most logprob_tolerance={config.logprob_tolerance}. "
                "Rollouts would be off-policy: check dtypes and that both use the same model."
            )
        return rollout

    return prepare


def _finite(scores: Array, answered: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores, np.float32)
    if scores.shape != answered.shape:
        raise ValueError(
            f"reward_fn gave shape {scores.shape}, wanted one score a row {answered.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(scores) & answered)
    if bad.size:
        raise ValueError(
            f"reward_fn gave {scores[bad[0]]} for row {bad[0]} ({bad.size} rows not finite); "
            "a failing reward must raise or give a finite score"
        )
    return np.where(answered, scores, 0.0)


def next_kl_coef(kl_coef: float, measured_kl: float, config: Config, rows: int) -> float:
    """β for the next iteration: the same, or adapted towards `kl_target`."""
    if config.kl_target is None:
        return kl_coef
    return float(
        losses.adaptive_kl_coef(
            kl_coef,
            measured_kl,
            target=config.kl_target,
            horizon=config.kl_horizon,
            batch_size=rows,
        )
    )


def make_loss(model: LanguageModel, critic: ScalarModel, config: Config | None = None) -> Loss:
    """The PPO loss: terms `policy` and `entropy` weighted by answer tokens, `value` by values."""
    config = Config() if config is None else config

    def count(batch: RolloutBatch) -> dict[str, Array]:
        tokens = jnp.sum(batch.tokens.loss_mask, dtype=jnp.float32)
        return {"policy": tokens, "value": jnp.sum(value_mask_of(batch), dtype=jnp.float32)}

    def terms(params: Params, batch: RolloutBatch) -> tuple[dict[str, Array], dict[str, Weighted]]:
        tokens, mask, value_mask = batch.tokens, batch.tokens.loss_mask, value_mask_of(batch)
        read = (tokens.inputs, tokens.positions, tokens.segment_ids)
        policy, value_params = params["policy"], params["critic"]

        hidden = model.apply(policy, *read)
        logprobs, entropy = target_logprobs(
            model, policy, hidden, tokens.targets, config.temperature, entropy=True, mask=mask
        )
        # Masked before the arithmetic: what stands in padding must not reach a gradient.
        new, old, ref = (
            jnp.where(mask, x, 0.0) for x in (logprobs, batch.old_logprobs, batch.ref_logprobs)
        )
        advantages = jnp.where(mask, batch.advantages, 0.0)
        policy_losses = losses.policy_loss(
            new,
            old,
            advantages,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
        )
        policy_total = weighted(policy_losses, mask).total
        if config.entropy_coef:
            policy_total -= config.entropy_coef * weighted(entropy, mask).total
        if config.kl_in == "loss":
            penalty = losses.kl(new, ref, config.kl_estimator)
            policy_total += config.kl_coef * weighted(penalty, mask).total

        values = critic.scores(value_params, critic.apply(value_params, *read))
        values, old_values, returns = (
            jnp.where(value_mask, x, 0.0) for x in (values, batch.old_values, batch.returns)
        )
        value_losses = losses.value_loss(
            values, old_values, returns, clip_range_value=config.clip_range_value
        )
        value_total = config.vf_coef * weighted(value_losses, value_mask).total

        ratio = jnp.exp(jnp.clip(new - old, -losses.MAX_LOG_RATIO, losses.MAX_LOG_RATIO))
        unclipped = -advantages * ratio
        limit = jnp.inf if config.clip_range_value is None else config.clip_range_value
        # A value within the bounds stays as it is, to the last bit: rounding is no clipping.
        near = jnp.clip(values, old_values - limit, old_values + limit)
        metrics = {
            "loss/policy_avg": weighted(policy_losses, mask),
            "loss/value_avg": weighted(value_losses, value_mask),
            "policy/approxkl_avg": weighted(0.5 * jnp.square(new - old), mask),
            "policy/clipfrac_avg": weighted(policy_losses > unclipped, mask),
            "policy/entropy_avg": weighted(entropy, mask),
            "val/ratio": weighted(ratio, mask),
            "val/clipfrac_avg": weighted(
                jnp.square(near - returns) > jnp.square(values - returns), value_mask
            ),
        }
        return {"policy": policy_total, "value": value_total}, jax.lax.stop_gradient(metrics)

    return Loss(count, terms)


def make_step(
    model: LanguageModel,
    critic: ScalarModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
) -> Step:
    """`step(state, batch: RolloutBatch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(model, critic, config), tx, micro_batches)
