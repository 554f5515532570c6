"""What PPO's options may be, and which of them go together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxalign.losses import advantages as groups
from jaxalign.losses import aggregate as averages
from jaxalign.losses import ppo as losses

if TYPE_CHECKING:
    from jaxalign.algorithms.ppo import Config

ESTIMATORS = ("gae", "rloo", "grpo", "reinforce++", "reinforce++_baseline")
_OF_GROUPS = ("rloo", "grpo", "reinforce++_baseline")
_IS_LEVELS = ("token", "sequence")

_READ_BY = (
    (("lam", "clip_range_value", "vf_coef", "whiten_rewards", "shared_critic"), ("gae",)),
    (("gamma", "score_at"), ("gae", "reinforce++", "reinforce++_baseline")),
    (("scale_rewards",), ("grpo",)),
)
"""Options, and the estimators that read them."""


def check_options(config: Config) -> None:
    """Raises ValueError for a value out of range, and for one that the estimator does not read."""

    def want(ok: bool, name: str, wanted: str) -> None:
        if not ok:
            raise ValueError(f"ppo {name}={getattr(config, name)!r}: wanted {wanted}")

    def choice(name: str, known: tuple[str, ...]) -> None:
        want(getattr(config, name) in known, name, f"one of {', '.join(known)}")

    choice("advantage_estimator", ESTIMATORS)
    choice("importance_sampling_level", _IS_LEVELS)
    choice("kl_estimator", losses.KL_ESTIMATORS)
    choice("kl_in", ("reward", "loss"))
    want(config.max_new_tokens >= 1, "max_new_tokens", "a positive integer")
    want(config.samples >= 1, "samples", "a positive integer")
    compares = config.advantage_estimator in _OF_GROUPS or config.skip_equal_groups
    want(config.samples > 1 or not compares, "samples", "2 or more: answers are compared")
    want(config.slots is None or config.slots >= 1, "slots", "a positive integer, or null")
    want(
        config.cache_dtype in (None, "float32", "bfloat16", "float16"),
        "cache_dtype",
        "float32, bfloat16, float16 or null",
    )
    want(config.temperature > 0, "temperature", "a positive number (sampling, not greedy)")
    want(config.top_k >= 0, "top_k", "0 (off) or a positive integer")
    want(0 < config.top_p <= 1, "top_p", "a value in (0, 1]")
    want(config.kl_target is None or config.kl_target > 0, "kl_target", "a positive number")
    want(
        config.kl_target is None or config.kl_in == "reward", "kl_target", 'None with kl_in="loss"'
    )
    want(0 <= config.gamma <= 1, "gamma", "a value in [0, 1]")
    want(0 <= config.lam <= 1, "lam", "a value in [0, 1]")
    for name in ("kl_coef", "vf_coef", "ptx_coef", "missing_eos_penalty"):
        want(getattr(config, name) >= 0, name, "0 or more")
    for name in ("kl_horizon", "logprob_tolerance"):
        want(getattr(config, name) > 0, name, "a positive number")
    want(config.whiten_ddof in (0, 1), "whiten_ddof", "0 or 1")
    want(config.reward_clip is None or config.reward_clip > 0, "reward_clip", "a positive number")
    groups.check_scale(config.scale_rewards)
    averages.check_aggregation(config.loss_aggregation)
    losses.check_score_at(config.score_at)
    losses.check_clip(config.clip_range, config.clip_range_high, config.dual_clip)
    losses.check_clip_value(config.clip_range_value)
    # What an estimator does not read must not be set for it.
    for names, readers in _READ_BY:
        for name in names:
            default = type(config).__dataclass_fields__[name].default
            used = config.advantage_estimator in readers or getattr(config, name) == default
            want(used, name, f"{default!r} with {config.advantage_estimator}, which ignores it")
