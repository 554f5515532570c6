"""Proximal policy optimisation against a reward, under a KL leash; with a critic or without.

    r_t = score·[t = last] − β · kl_t                                  shaped reward of a token
    A_t = Σ_k (γλ)^k δ_{t+k},   δ_t = r_t + γ V_{t+1} − V_t             advantage
    L   = E[max(−A ρ, −A clip(ρ, 1−ε, 1+ε))] + c_v · ½ E[max((V−R)², (clip(V)−R)²)]

with ρ_t = π(y_t|·)/π_old(y_t|·) (Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for
language models: Ziegler et al. 2019, https://arxiv.org/abs/1909.08593; Huang et al. 2024,
https://arxiv.org/abs/2403.17031). Four models: policy and critic are trained; the frozen reference
and the reward act in `prepare`, which samples answers, scores them and computes advantages, once
an iteration. `minibatches` then cuts the rollout up for several epochs of steps.

The relatives differ in A and in how tokens are averaged: RLOO, GRPO, Dr. GRPO, DAPO, REINFORCE++
and GSPO compare the `samples` answers to a prompt instead of asking a critic (`losses.advantages`,
`losses.aggregate`; recipes in docs/ppo.md). Pass `critic=None` for them.

State: `TrainState` with `params = {"policy": …, "critic": …}`, or the policy alone. Batch:
`RolloutBatch`, `[B, T]`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxalign.algorithms.ppo.answers import (
    CALIBRATIONS,
    RewardFn,
    calibrate,
    draw_answers,
    score_answers,
)
from jaxalign.algorithms.ppo.checks import check_options
from jaxalign.algorithms.ppo.controllers import (
    ScoreStats,
    next_kl_coef,
    next_score_stats,
    running_scale,
)
from jaxalign.algorithms.ppo.dynamic_sampling import count_equal_groups, fill_equal_groups
from jaxalign.algorithms.ppo.experience import make_experience
from jaxalign.algorithms.ppo.optimizer import init_params, make_optimizer
from jaxalign.algorithms.ppo.rollout import (
    answer_mask_of,
    join_tokens,
    logprob_difference,
    minibatches,
    rollout_figures,
    rollout_metrics,
    value_mask_of,
)
from jaxalign.algorithms.prepare import Prepare
from jaxalign.algorithms.step import Loss, Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses import aggregate as averages
from jaxalign.losses import ppo as losses
from jaxalign.losses.masked import keep, weighted
from jaxalign.losses.sft import nll
from jaxalign.models.base import LanguageModel, ScalarModel, combine, read, read_counts
from jaxalign.models.lm_head import target_logprobs, target_sum
from jaxalign.parallel.rules import Rules
from jaxalign.parallel.sharding import mesh_of, shard_batch, use_mesh
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
    "CALIBRATIONS",
    "Config",
    "RewardFn",
    "ScoreStats",
    "calibrate",
    "count_equal_groups",
    "fill_equal_groups",
    "init_params",
    "join_tokens",
    "make_experience",
    "make_loss",
    "make_optimizer",
    "make_prepare",
    "make_step",
    "minibatches",
    "next_kl_coef",
    "next_score_stats",
    "rollout_figures",
    "rollout_metrics",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PPO. Names as in TRL's PPOConfig where it has them.

    Attributes:
      advantage_estimator: "gae" has a critic; "rloo", "grpo", "reinforce++" (Hu et al. 2025) and
        "reinforce++_baseline" have none.
      samples: answers to each prompt; more than one for what compares them.
      slots: answers written at a time, see `sample`; None: all.
      cache_dtype: of keys and values while sampling; None: the model's compute dtype.
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
      gamma, lam: γ and λ of the advantage estimate; λ of "gae" only.
      scale_rewards: of "grpo": what divides an advantage, the standard deviation of its "group", of
        the "batch", or nothing ("none": Dr. GRPO).
      clip_range, clip_range_high, dual_clip: bounds of the ratio, see `losses.ppo.policy_loss`.
      importance_sampling_level: "token", or "sequence": one ratio an answer, the geometric mean of
        its tokens' (GSPO, Zheng et al. 2025); its clip ranges are of order 1e-4.
      loss_aggregation: which tokens weigh the same, "token", "sequence" or "constant", see
        `losses.aggregate`; of the policy's loss, with the entropy and KL terms in it.
      mask_truncated: answers without stop token leave the loss (DAPO).
      skip_equal_groups: prompts whose answers all score alike leave the loss (DAPO); they are
        counted in `groups/equal`, not sampled anew.
      clip_range_value: bound of the critic's move, None for none.
      vf_coef: c_v, weight of the critic's loss.
      shared_critic: the critic is a head on the policy's hidden states, `params["critic"]` that
        head alone, and its loss trains the policy's trunk too.
      entropy_coef: weight of the entropy bonus; 0 is off.
      ptx_coef: weight of −log π a token of `RolloutBatch.ptx`, text as in pre-training (Ouyang et
        al. 2022, eq. 2, where the sum over a text is weighed); 0 is off.
      whiten_advantages: normalise advantages over the answers' tokens of the whole rollout. None:
        as published, for "gae" and the two of REINFORCE++.
      whiten_rewards: divide rewards by their standard deviation, keeping the mean.
      whiten_ddof: 0 for the biased variance, 1 for the unbiased.
      score_at: "eos" (last token of the answer) or "after_eos" (the position after, as TRL).
      normalize_scores: subtract the mean and divide by the standard deviation of all scores so far.
      reward_clip: cut scores to ± this after that; None: no cut.
      missing_eos_penalty: subtracted from the score of an answer without stop token; ≥ 0.
      logprob_tolerance: largest mean |sampler − trainer| log-probability difference, nats a token,
        before `prepare` stops the run.
    """

    advantage_estimator: str = "gae"
    samples: int = 1
    slots: int | None = None
    cache_dtype: str | None = None
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
    scale_rewards: str = "group"
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: str = "token"
    loss_aggregation: str = "token"
    mask_truncated: bool = False
    skip_equal_groups: bool = False
    clip_range_value: float | None = 0.2
    vf_coef: float = 0.1
    shared_critic: bool = False
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    whiten_advantages: bool | None = None
    whiten_rewards: bool = False
    whiten_ddof: int = 0
    score_at: str = "eos"
    normalize_scores: bool = False
    reward_clip: float | None = None
    missing_eos_penalty: float = 0.0
    logprob_tolerance: float = 0.05

    def __post_init__(self):
        check_options(self)

    @property
    def has_critic(self) -> bool:
        """Whether advantages need a critic."""
        return self.advantage_estimator == "gae"

    @property
    def whitens(self) -> bool:
        """Whether advantages are whitened."""
        if self.whiten_advantages is None:
            return self.advantage_estimator not in ("rloo", "grpo")
        return self.whiten_advantages

    def check_critic(self, critic: object) -> None:
        """Raises ValueError for a critic too many or too few."""
        if (critic is not None) != self.has_critic:
            raise ValueError(
                f"ppo advantage_estimator={self.advantage_estimator!r} with "
                f"critic={None if critic is None else type(critic).__name__}: wanted "
                f"{'a critic' if self.has_critic else 'None'}"
            )


def make_prepare(
    model: LanguageModel,
    critic: ScalarModel | None,
    reward_fn: RewardFn,
    config: Config | None = None,
    *,
    reference: LanguageModel | None = None,
    rollout_mesh: Mesh | None = None,
    rollout_rules: Rules | None = None,
) -> Prepare[..., RolloutBatch]:
    """Builds `prepare(key, state, ref_params, prompts, kl_coef=None, …) -> RolloutBatch`.

    One iteration's experience: answers sampled from the policy, scores from `reward_fn`, per-token
    KL against the frozen reference, advantages, and with a critic values and returns. Weights are
    used where they lie, not copied. A prompt's `samples` answers are adjacent rows.

    Args:
      model: the policy.
      critic: value model; None where the advantages need none.
      reward_fn: gives every answer a finite score; runs outside jit, so that it may be any Python.
      config: options.
      reference: the model of `ref_params`; None: the policy's.
      rollout_mesh: where answers are written, see `sample`; None: where the policy lies.
      rollout_rules: layouts while they are, see `sample`; None: those of the rest.

    Returns:
      `prepare(key, state, ref_params, prompts, kl_coef=None, *, temperature=None,
      calibration=None, score_stats=None)`. `kl_coef` and `temperature` override the configured
      ones and compile nothing. `calibration = (shift, scale)` turns what `reward_fn` gives into
      (score − shift) / scale; with `normalize_scores`, `score_stats` are those of all scores so
      far (`next_score_stats` takes this rollout in). It raises ValueError where a score is not
      finite, and where the sampler's log-probabilities differ from the trainer's by more than
      `logprob_tolerance` on average. `.lower` is that of `make_experience`.
    """
    config = Config() if config is None else config
    if config.missing_eos_penalty and not config.stop_tokens:
        raise ValueError(
            f"ppo missing_eos_penalty={config.missing_eos_penalty} without stop_tokens: every "
            "answer would be unfinished; set stop_tokens, or the penalty to 0"
        )
    if config.mask_truncated and not config.stop_tokens:
        raise ValueError(
            "ppo mask_truncated=True without stop_tokens: every answer would leave the loss; set "
            "stop_tokens, or mask_truncated to false"
        )
    experience = make_experience(model, critic, config, reference=reference)

    def prepare(
        key: jax.Array,
        state: TrainState,
        ref_params: Params,
        prompts: PromptBatch,
        kl_coef: float | Array | None = None,
        *,
        temperature: float | Array | None = None,
        calibration: tuple[float, float] | None = None,
        score_stats: ScoreStats | None = None,
    ) -> RolloutBatch:
        mesh = mesh_of(state.params)
        if mesh is not None:
            prompts = shard_batch(prompts, mesh)
        heat = config.temperature if temperature is None else temperature
        kl_coef = jnp.asarray(config.kl_coef if kl_coef is None else kl_coef, jnp.float32)
        heat = jnp.asarray(heat, jnp.float32)
        policy = combine(state.params, state.frozen)["policy"]
        prompts, answers, tokens = draw_answers(
            key, model, policy, prompts, config, heat, rollout_mesh, rollout_rules
        )
        with use_mesh(mesh):
            scores, parts = score_answers(reward_fn, tokens, prompts, answers.mask, calibration)
            if mesh is not None:
                scores, parts = shard_batch((scores, parts), mesh)
            scale = None
            if config.normalize_scores:
                scale = running_scale(scores, answers, config.missing_eos_penalty, score_stats)
            # The sampler's log-probabilities are aligned with targets: shifted by one, once.
            blank = jnp.zeros((answers.tokens.shape[0], prompts.tokens.shape[1] - 1))
            end = jnp.zeros((answers.tokens.shape[0], 1))
            recorded = jnp.concatenate([blank, answers.logprobs, end], axis=1)
            if mesh is not None:
                recorded = shard_batch(recorded, mesh)
            rollout = experience(
                state,
                ref_params,
                tokens,
                scores,
                answers.finished,
                recorded,
                kl_coef,
                heat,
                scale,
            )
            rollout = rollout._replace(reward_parts=parts)
            mask = answer_mask_of(rollout)
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

    return Prepare(prepare, experience.lower)


def make_loss(
    model: LanguageModel, critic: ScalarModel | None, config: Config | None = None
) -> Loss:
    """The PPO loss: `policy`, weighted as `loss_aggregation` says, `value` by value positions.

    Also `ptx` by its tokens, where there is such text, and what the models themselves add (`read`).
    """
    config = Config() if config is None else config
    config.check_critic(critic)
    apart = critic is not None and not config.shared_critic

    def count(batch: RolloutBatch) -> dict[str, Array]:
        tokens = batch.tokens
        weights: dict[str, Array] = {
            "policy": averages.aggregate_weight(
                tokens, config.loss_aggregation, config.max_new_tokens
            ),
            **read_counts(model, tokens),
        }
        if critic is not None:
            weights["value"] = jnp.sum(value_mask_of(batch), dtype=jnp.float32)
        if apart:
            counts = read_counts(critic, tokens)
            weights |= {f"critic_{name}": weight for name, weight in counts.items()}
        if config.ptx_coef:
            text = _ptx_of(batch)
            weights["ptx"] = jnp.sum(text.loss_mask, dtype=jnp.float32)
            for name, weight in read_counts(model, text).items():
                weights[name] = weights[name] + weight
        return weights

    def terms(params: Params, batch: RolloutBatch) -> tuple[dict[str, Array], dict[str, Weighted]]:
        hidden, extra = read(model, params["policy"], batch.tokens)
        total, metrics = policy_terms(params["policy"], hidden, batch)
        sums: dict[str, Array] = {"policy": total}
        if critic is not None:
            if apart:
                hidden, added = read(critic, params["critic"], batch.tokens)
                extra |= {f"critic_{name}": term for name, term in added.items()}
            values = critic.scores(params["critic"], hidden)
            sums["value"], of_values = _value_terms(values, batch, config)
            metrics |= of_values
        if config.ptx_coef:
            text = _ptx_of(batch)
            hidden, added = read(model, params["policy"], text)
            mask = text.loss_mask
            found = target_sum(model, params["policy"], hidden, text.targets, mask)
            metrics["loss/ptx_avg"] = weighted(nll(found.logprobs), mask)
            sums["ptx"] = -config.ptx_coef * found.total
            extra |= {name: jax.tree.map(jnp.add, extra[name], x) for name, x in added.items()}
        sums |= {name: term.total for name, term in extra.items()}
        return sums, jax.lax.stop_gradient(metrics | extra)

    def policy_terms(
        policy: Params, hidden: jax.Array, batch: RolloutBatch
    ) -> tuple[Array, dict[str, Weighted]]:
        tokens, mask = batch.tokens, batch.tokens.loss_mask
        # The same in every row: what belongs to a whole batch has to be cut up with it.
        heat = config.temperature if batch.temperature is None else jnp.max(batch.temperature)
        coef = config.kl_coef if batch.kl_coef is None else jnp.max(batch.kl_coef)
        logprobs, entropy = target_logprobs(
            model,
            policy,
            hidden,
            tokens.targets,
            heat,
            entropy=True,
            entropy_gradient=config.entropy_coef != 0,
            mask=mask,
        )
        # Masked before the arithmetic: what stands in padding must not reach a gradient.
        new, old, ref, advantages = (
            keep(x, mask)
            for x in (logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages)
        )
        moved = new - old
        if config.importance_sampling_level == "sequence":
            moved = averages.answer_mean(moved, tokens)
        # The log-ratio against 0: added to log π_old it would come back rounded.
        policy_losses = losses.policy_loss(
            moved,
            jnp.zeros_like(moved),
            advantages,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            dual_clip=config.dual_clip,
        )
        loss = policy_losses
        if config.entropy_coef:
            loss = loss - config.entropy_coef * entropy
        if config.kl_in == "loss":
            loss = loss + coef * losses.kl(new, ref, config.kl_estimator)

        def averaged(x: jax.Array) -> Weighted:
            return averages.aggregate(x, tokens, config.loss_aggregation, config.max_new_tokens)

        ratio = jnp.exp(jnp.clip(moved, -losses.MAX_LOG_RATIO, losses.MAX_LOG_RATIO))
        return averaged(loss).total, {
            "loss/policy_avg": averaged(policy_losses),
            "policy/approxkl_avg": weighted(0.5 * jnp.square(new - old), mask),
            "policy/clipfrac_avg": weighted(policy_losses > -advantages * ratio, mask),
            "policy/entropy_avg": weighted(entropy, mask),
            "val/ratio": weighted(ratio, mask),
            "val/ratio_var": weighted(jnp.square(ratio - 1), mask),
        }

    return Loss(count, terms)


def _value_terms(
    values: jax.Array, batch: RolloutBatch, config: Config
) -> tuple[Array, dict[str, Weighted]]:
    if batch.old_values is None or batch.returns is None:
        raise ValueError("the rollout has no old_values and returns; prepare it with the critic")
    mask = value_mask_of(batch)
    values, old, returns = (keep(x, mask) for x in (values, batch.old_values, batch.returns))
    limit = config.clip_range_value
    value_losses = losses.value_loss(values, old, returns, clip_range_value=limit)
    # A value within the bounds stays as it is, to the last bit: rounding is no clipping.
    near = values if limit is None else jnp.clip(values, old - limit, old + limit)
    clipped = jnp.square(near - returns) > jnp.square(values - returns)
    average = weighted(value_losses, mask)
    metrics = {"loss/value_avg": average, "val/clipfrac_avg": weighted(clipped, mask)}
    return config.vf_coef * average.total, metrics


def _ptx_of(batch: RolloutBatch) -> TokenBatch:
    if batch.ptx is None:
        raise ValueError("ppo ptx_coef > 0 and no text; wanted batch._replace(ptx=TokenBatch)")
    return batch.ptx


def make_step(
    model: LanguageModel,
    critic: ScalarModel | None,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
) -> Step:
    """`step(state, batch: RolloutBatch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(model, critic, config), tx, micro_batches)
