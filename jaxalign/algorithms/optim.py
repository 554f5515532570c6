"""Optimizers and learning-rate schedules: optax, combined as alignment recipes do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.low_precision_adam import (
    MOMENTS,
    round_weights_at_random,
    scale_by_small_adam,
)
from jaxalign.parallel.host_memory import offload_state
from jaxalign.types import Params

SCHEDULES = ("constant", "linear", "cosine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019) behind gradient clipping.

    Attributes:
      learning_rate: peak rate, after warm-up.
      schedule: "constant", or "linear" / "cosine" decay to `end_fraction` of the peak.
      warmup_steps: updates of linear rise from 0; the first update's rate is 0, as in
        Hugging Face's schedules.
      warmup_ratio: in place of `warmup_steps`: their fraction of all updates, in [0, 1), rounded
        up.
      total_steps: updates in all, warm-up included; the training loop fills it in.
      end_fraction: last rate as a fraction of the peak.
      b1, b2, eps: Adam's.
      weight_decay: on matrices (embeddings and heads too), not on norms and biases.
      max_grad_norm: gradients are scaled down to this global 2-norm; None for no clipping.
      moments: the type of Adam's two moments between updates: "float32" (8 bytes a parameter,
        whatever the parameters' type), "bfloat16" (4) or "int8" (2); see
        `jaxalign.algorithms.low_precision_adam`.
      offload: keep the moments in host memory between updates.
    """

    learning_rate: float = 1e-5
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    total_steps: int | None = None
    end_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    moments: str = "float32"
    offload: bool = False

    def __post_init__(self):
        def want(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"optimizer {name}={getattr(self, name)!r}: wanted {wanted}")

        want(self.learning_rate >= 0, "learning_rate", "0 or more")
        want(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}")
        want(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        want(0 <= self.warmup_ratio < 1, "warmup_ratio", "a value in [0, 1)")
        want(not (self.warmup_ratio and self.warmup_steps), "warmup_ratio", "0 beside warmup_steps")
        want(self.total_steps is None or self.total_steps > 0, "total_steps", "a positive integer")
        want(0 <= self.end_fraction <= 1, "end_fraction", "a value in [0, 1]")
        want(0 <= self.b1 < 1, "b1", "a value in [0, 1)")
        want(0 <= self.b2 < 1, "b2", "a value in [0, 1)")
        want(self.eps > 0, "eps", "a positive number")
        want(self.weight_decay >= 0, "weight_decay", "0 or more")
        want(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "positive")
        want(self.moments in MOMENTS, "moments", f"one of {', '.join(MOMENTS)}")


def _warmup(config: OptimizerConfig) -> int:
    """Updates of warm-up."""
    if not config.warmup_ratio:
        return config.warmup_steps
    if config.total_steps is None:
        raise ValueError(
            f"optimizer warmup_ratio={config.warmup_ratio} wants total_steps (updates in all); set "
            "it, or give warmup_steps"
        )
    return math.ceil(round(config.warmup_ratio * config.total_steps, 6))


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Update number (from 0) → learning rate.

    Raises:
      ValueError: a decaying schedule without `total_steps`, or warm-up longer than it.
    """
    peak, warmup = config.learning_rate, _warmup(config)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        if config.total_steps is None:
            raise ValueError(
                f"optimizer schedule={config.schedule!r} wants total_steps (updates in all); "
                "set it, or use schedule='constant'"
            )
        if config.total_steps <= warmup:
            raise ValueError(
                f"optimizer warmup_steps={warmup}: wanted fewer than the {config.total_steps} "
                f"updates in all (total_steps, which a run counts from run.steps and its data); "
                f"lower warmup_steps, or train for longer"
            )
        length = config.total_steps - warmup
        if config.schedule == "linear":
            after = optax.linear_schedule(peak, peak * config.end_fraction, length)
        else:
            after = optax.cosine_decay_schedule(peak, length, config.end_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decays(params: Params) -> Any:
    """Which parameters weight decay applies to: all but norms' scales and biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: getattr(path[-1], "key", None) not in ("scale", "bias"), params
    )


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with float32 gradients, parameters and moments; without it, moments have their type."""

    def cast(tree: Any) -> Any:
        return optax.tree.cast(tree, jnp.float32)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)


def make_optimizer(config: OptimizerConfig | None = None) -> optax.GradientTransformation:
    """Clipping, then AdamW with the configured schedule; bfloat16 weights round stochastically."""
    config = OptimizerConfig() if config is None else config
    if not isinstance(config, OptimizerConfig):
        rate = f"(learning_rate={config!r})" if isinstance(config, (int, float)) else "(…)"
        raise ValueError(
            f"make_optimizer: got {config!r}, wanted an OptimizerConfig; write "
            f"ja.make_optimizer(ja.OptimizerConfig{rate})"
        )
    schedule = make_schedule(config)
    if config.moments == "float32":
        adamw = _in_float32(
            optax.adamw(
                schedule,
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                weight_decay=config.weight_decay,
                mask=decays,
            )
        )
    else:
        adamw = optax.chain(
            scale_by_small_adam(config.moments, config.b1, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, decays),
            optax.scale_by_learning_rate(schedule),
        )
    if config.offload:
        adamw = offload_state(adamw)
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    return optax.chain(*clip, adamw, round_weights_at_random())
