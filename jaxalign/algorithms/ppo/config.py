"""PPO's options: their ranges, and which of them go together."""

from __future__ import annotations

import dataclasses

from jaxalign.losses import advantages, aggregate
from jaxalign.losses import ppo as losses
from jaxalign.sampling.weights import WEIGHTS

ESTIMATORS = ("gae", "rloo", "grpo", "reinforce++", "reinforce++_baseline")
_COMPARING = ("rloo", "grpo", "reinforce++_baseline")
_IS_LEVELS = ("token", "sequence")
_CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn")

_READ_BY = (
    (("lam", "clip_range_value", "vf_coef", "whiten_rewards", "shared_critic"), ("gae",)),
    (("gamma", "score_at"), ("gae", "reinforce++", "reinforce++_baseline")),
    (("scale_rewards",), ("grpo",)),
)
"""Options that only some estimators read, and those estimators."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of PPO, with TRL's PPOConfig names where TRL has the option.

    Attributes:
      max_new_tokens: longest answer, in tokens.
      stop_tokens: ids that end an answer.
      pad_token: id written after the end; may be any id, masks do not read it.
      temperature: divides the logits of policy, reference and rollout alike; > 0.
      top_k, top_p: sampling filters, off (0 and 1) by default, because with them the sampler
        differs from the distribution whose log-probabilities are trained.
      samples: answers per prompt; more than one for estimators that compare them.
      slots: answers sampled at a time, see `sample`; None: all. In a run, None becomes fewer where
        the last rollout's answers were so ragged that this is faster (`jaxalign.sampling.refill`).
      speculate: draft tokens of a decode step, see `sample`; 0: none. It requires `slots=None`.
      score_early: score an answer as soon as it has ended, while the others are being written. It
        requires a reward that scores each answer by itself in Python, `slots=None`, no `speculate`
        and one process. The scores stay the same.
      cache_dtype: dtype of the key-value cache while sampling; None: the model's compute dtype.
      sampling_weights: "bfloat16" or "int8": sampling reads a copy of the weights in fewer bits,
        made anew for every rollout; None: the weights themselves. See `jaxalign.sampling.weights`.
      logprob_tolerance: the largest mean |sampler − trainer| difference of log-probabilities, in
        nats per token, that `prepare` accepts; above it the run stops.
      router_replay: for a mixture of experts: the trainer's passes use the experts that the sampler
        took (Ma et al. 2025, https://arxiv.org/abs/2510.11370). Without it, rounding may flip a
        near-tie between two experts, and so change a token's log-probability.
      pack_experience: 0: the rollout's log-probabilities and values are computed one answer per
        row. n: in packed rows, with the smallest of n shapes that holds them (`minibatches` packs
        the updates). Not used with `router_replay`.
      keep_lower_states: where only the upper layers have adapters, run the layers below once over a
        rollout and keep their hidden states, B · T · D numbers, for all updates. The reference and
        a critic of such adapters share them if their lower layers are the policy's own arrays (see
        `same_lower_layers`); another such critic keeps its own.
      shared_prompts: packed rows hold a prompt once, followed by its answers (`samples` > 1). The
        balance loss of a mixture of experts then counts its tokens once.

      missing_eos_penalty: subtracted from the score of an answer without a stop token; ≥ 0.
      normalize_scores: subtract the mean and divide by the standard deviation of all scores so far.
      reward_clip: after normalising, clip scores to ± this; None: no clipping.
      score_at: "eos" (last token of the answer) or "after_eos" (the position after, as TRL).
      whiten_rewards: divide rewards by their standard deviation, keeping the mean.

      kl_coef: β ≥ 0, the penalty per nat of KL to the reference, in units of the score.
      kl_estimator: "k1", "k2" or "k3".
      kl_in: "reward" (shaped into the rewards) or "loss" (a term of its own).
      kl_target: if set, β is adapted to keep this KL (nats per answer), see `losses.ppo`.
      kl_horizon: the controller's horizon, in answers.

      advantage_estimator: "gae" has a critic; "rloo", "grpo", "reinforce++" (Hu et al. 2025) and
        "reinforce++_baseline" have none.
      gamma, lam: in [0, 1]: γ and λ of the advantage estimate; λ of "gae" only.
      scale_rewards: for "grpo": divide an advantage by the standard deviation of its "group", of
        the "batch", or by nothing ("none": Dr. GRPO).
      whiten_advantages: normalise advantages over the answers' tokens of the whole rollout. None:
        as published, that is for "gae" and both REINFORCE++ estimators.
      whiten_ddof: 0 for the biased variance, 1 for the unbiased.
      mask_truncated: exclude answers without a stop token from the loss (DAPO).
      skip_equal_groups: exclude prompts whose answers all have the same score from the loss (DAPO).
        They are counted in `groups/equal`, not replaced.

      clip_range, clip_range_high, dual_clip: bounds of the ratio, see `losses.ppo.policy_loss`.
      importance_sampling_level: "token", or "sequence": one ratio per answer, the geometric mean of
        its tokens' ratios (GSPO, Zheng et al. 2025); typical clip ranges are then of order 1e-4.
      loss_aggregation: how the policy's loss, with its entropy and KL terms, is averaged: "token",
        "sequence" or "constant", see `losses.aggregate`.
      entropy_coef: weight of the entropy bonus; 0 is off.

      vf_coef: c_v, weight of the critic's loss.
      clip_range_value: bound on the change of a value; None for no bound.
      shared_critic: the critic is a head on the policy's hidden states. `params["critic"]` holds
        only that head, and its loss also trains the policy's trunk.

      ptx_coef: weight of the mean −log π per token of `RolloutBatch.ptx`, pre-training text (Ouyang
        et al. 2022, eq. 2, which instead weights the sum over a text); 0 is off.
    """

    # Sampling.
    max_new_tokens: int = 64
    stop_tokens: tuple[int, ...] = ()
    pad_token: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    samples: int = 1
    slots: int | None = None
    speculate: int = 0
    score_early: bool = False
    cache_dtype: str | None = None
    sampling_weights: str | None = None
    logprob_tolerance: float = 0.05
    router_replay: bool = False
    pack_experience: int = 0
    keep_lower_states: bool = False
    shared_prompts: bool = False
    # Scores and rewards.
    missing_eos_penalty: float = 0.0
    normalize_scores: bool = False
    reward_clip: float | None = None
    score_at: str = "eos"
    whiten_rewards: bool = False
    # KL to the reference.
    kl_coef: float = 0.05
    kl_estimator: str = "k1"
    kl_in: str = "reward"
    kl_target: float | None = None
    kl_horizon: float = 10000.0
    # Advantages.
    advantage_estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    scale_rewards: str = "group"
    whiten_advantages: bool | None = None
    whiten_ddof: int = 0
    mask_truncated: bool = False
    skip_equal_groups: bool = False
    # The policy's loss.
    clip_range: float = 0.2
    clip_range_high: float | None = None
    dual_clip: float | None = None
    importance_sampling_level: str = "token"
    loss_aggregation: str = "token"
    entropy_coef: float = 0.0
    # The critic's loss.
    vf_coef: float = 0.1
    clip_range_value: float | None = 0.2
    shared_critic: bool = False
    # Text beside the rollout.
    ptx_coef: float = 0.0

    def __post_init__(self):
        _check_options(self)

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
        """Raises ValueError for a missing or an unneeded critic."""
        if (critic is not None) != self.has_critic:
            raise ValueError(
                f"ppo advantage_estimator={self.advantage_estimator!r} with "
                f"critic={None if critic is None else type(critic).__name__}: wanted "
                f"{'a critic' if self.has_critic else 'None'}"
            )

    def check_experts(self, experts: int) -> None:
        """Raises ValueError for `router_replay` with a policy that has no router."""
        if self.router_replay and not experts:
            raise ValueError(
                "ppo router_replay=True: the policy is no mixture of experts and has no router; "
                "leave it out"
            )

    def check_stop_tokens(self) -> None:
        """Raises ValueError for an option that needs stop tokens if there are none."""
        if self.missing_eos_penalty and not self.stop_tokens:
            raise ValueError(
                f"ppo missing_eos_penalty={self.missing_eos_penalty} without stop_tokens: every "
                "answer would be unfinished; set stop_tokens, or the penalty to 0"
            )
        if self.mask_truncated and not self.stop_tokens:
            raise ValueError(
                "ppo mask_truncated=True without stop_tokens: every answer would leave the loss; "
                "set stop_tokens, or mask_truncated to false"
            )


def _check_options(config: Config) -> None:
    """Raises ValueError for a value out of range, or an option that the estimator ignores."""

    def want(ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise ValueError(f"ppo {name}={getattr(config, name)!r}: wanted {wanted}")

    def one_of(name: str, known: tuple[str, ...]) -> None:
        want(getattr(config, name) in known, name, f"one of {', '.join(known)}")

    one_of("advantage_estimator", ESTIMATORS)
    one_of("importance_sampling_level", _IS_LEVELS)
    one_of("kl_estimator", losses.KL_ESTIMATORS)
    one_of("kl_in", ("reward", "loss"))
    want(config.max_new_tokens >= 1, "max_new_tokens", "a positive integer")
    want(config.samples >= 1, "samples", "a positive integer")
    compares = config.advantage_estimator in _COMPARING or config.skip_equal_groups
    want(config.samples > 1 or not compares, "samples", "2 or more: answers are compared")
    want(config.pack_experience >= 0, "pack_experience", "0 or more")
    alone = config.shared_prompts and config.samples == 1
    want(not alone, "shared_prompts", "False with samples=1: one answer has its prompt to itself")
    want(config.slots is None or config.slots >= 1, "slots", "a positive integer, or null")
    want(config.speculate >= 0, "speculate", "0 (off) or a positive integer")
    whole = config.slots is None and not config.router_replay
    want(whole or not config.speculate, "speculate", "0 with slots or router_replay")
    early = whole and not config.speculate
    want(
        early or not config.score_early,
        "score_early",
        "False with slots, speculate or router_replay",
    )
    wanted = f"{', '.join(WEIGHTS)} or null"
    want(config.sampling_weights in (None, *WEIGHTS), "sampling_weights", wanted)
    wanted = f"{', '.join(_CACHE_DTYPES)} or null"
    want(config.cache_dtype in (None, *_CACHE_DTYPES), "cache_dtype", wanted)
    want(config.temperature > 0, "temperature", "a positive number (sampling, not greedy)")
    want(config.top_k >= 0, "top_k", "0 (off) or a positive integer")
    want(0 < config.top_p <= 1, "top_p", "a value in (0, 1]")
    for name in ("kl_target", "reward_clip"):
        value = getattr(config, name)
        want(value is None or value > 0, name, "a positive number")
    fixed = config.kl_target is None or config.kl_in == "reward"
    want(fixed, "kl_target", 'None with kl_in="loss"')
    for name in ("gamma", "lam"):
        want(0 <= getattr(config, name) <= 1, name, "a value in [0, 1]")
    for name in ("kl_coef", "vf_coef", "ptx_coef", "missing_eos_penalty"):
        want(getattr(config, name) >= 0, name, "0 or more")
    for name in ("kl_horizon", "logprob_tolerance"):
        want(getattr(config, name) > 0, name, "a positive number")
    want(config.whiten_ddof in (0, 1), "whiten_ddof", "0 or 1")
    advantages.check_scale(config.scale_rewards)
    aggregate.check_aggregation(config.loss_aggregation)
    losses.check_score_at(config.score_at)
    losses.check_clip(config.clip_range, config.clip_range_high, config.dual_clip)
    losses.check_clip_value(config.clip_range_value)
    # An option that the estimator ignores must keep its default.
    for names, readers in _READ_BY:
        for name in names:
            default = type(config).__dataclass_fields__[name].default
            used = config.advantage_estimator in readers or getattr(config, name) == default
            want(used, name, f"{default!r} with {config.advantage_estimator}, which ignores it")
