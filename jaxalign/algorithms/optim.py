"""Optimizers and learning-rate schedules: optax, combined as in alignment recipes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.adafactor import scale_by_adafactor
from jaxalign.algorithms.averages import with_average
from jaxalign.algorithms.low_precision_adam import (
    MOMENTS,
    round_weights_at_random,
    scale_by_small_adam,
)
from jaxalign.algorithms.matrices import is_vector
from jaxalign.algorithms.muon import scale_by_muon
from jaxalign.algorithms.param_patterns import check_patterns, update_by_pattern
from jaxalign.parallel.host_memory import offload_state
from jaxalign.types import Params

SCHEDULES = ("constant", "linear", "cosine", "wsd")

OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw": ("b1", "b2", "eps", "moments"),
    "adafactor": (),
    "lion": ("b1", "b2"),
    "muon": ("b1", "b2", "eps", "momentum", "muon_rms"),
    "schedule_free": ("b1", "b2", "eps"),
    "sgd": ("momentum",),
}
"""Optimizer name → the options it reads, among those that not every optimizer reads."""

USES = ("eval", "export")
"""What a moving average of the weights may be used for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Gradient clipping followed by an optimizer, by default AdamW (Loshchilov and Hutter 2019).

    Attributes:
      name: "adamw"; "adafactor" (Shazeer and Stern 2018), "lion" (Chen et al. 2023), "muon" (Jordan
        et al. 2024; embeddings, heads, norms and biases by Adam), "schedule_free" (Defazio et al.
        2024: AdamW, evaluated and exported as an average of its weights), "sgd" (with momentum).
      learning_rate: peak rate, after warm-up.
      learning_rates: pattern → peak rate of the parameters whose path contains a match: a number,
        or a multiple of `learning_rate` such as "10x"; 0 leaves them unchanged. Patterns are
        regular expressions; the first one that matches decides.
      schedule: "constant"; "linear" or "cosine" decay to `end_fraction` of the peak; or "wsd": warm
        up, stay, then linear decay over the last `decay_ratio` of all updates.
      warmup_steps: updates of linear rise from 0; the first update's rate is 0, as in
        Hugging Face's schedules.
      warmup_ratio: in place of `warmup_steps`: the fraction of all updates to warm up for, in [0,
        1); the number of updates is rounded up.
      decay_ratio: wsd: the fraction of all updates to decay over, in (0, 1], rounded up to whole
        updates; at most the updates after warm-up.
      total_steps: updates in all, warm-up included; the training loop fills it in.
      end_fraction: last rate as a fraction of the peak.
      b1, b2, eps: Adam's; Lion also uses b1 and b2, and its authors advise b2 = 0.99.
      momentum: Muon's and SGD's.
      muon_rms: root mean square of Muon's updates; 0.2 makes them like AdamW's, so that both can
        share a learning rate; null: Jordan's scale, √max(1, out / in).
      weight_decay: on matrices (embeddings and heads too), not on norms and biases.
      weight_decays: pattern → weight decay of the parameters whose path contains a match, including
        norms and biases.
      max_grad_norm: gradients are scaled down to this global 2-norm; None for no clipping.
      moments: the type of Adam's two moments between updates: "float32" (8 bytes per parameter,
        whatever the parameters' type), "bfloat16" (4) or "int8" (2); see
        `jaxalign.algorithms.low_precision_adam`.
      offload: keep the moments in host memory between updates.
      ema: decay of an exponential moving average of the weights, such as 0.999; None: none. It
        takes 4 bytes per parameter.
      ema_for: what the average is used for: "eval", "export" or both.
    """

    name: str = "adamw"
    learning_rate: float = 1e-5
    learning_rates: Mapping[str, float | str] = dataclasses.field(default_factory=dict)
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    decay_ratio: float = 0.1
    total_steps: int | None = None
    end_fraction: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum: float = 0.95
    muon_rms: float | None = 0.2
    weight_decay: float = 0.0
    weight_decays: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_grad_norm: float | None = 1.0
    moments: str = "float32"
    offload: bool = False
    ema: float | None = None
    ema_for: tuple[str, ...] = USES

    def __post_init__(self):
        def want(ok: bool, name: str, wanted: str) -> None:
            if not ok:
                raise ValueError(f"optimizer {name}={getattr(self, name)!r}: wanted {wanted}")

        want(self.name in OPTIMIZERS, "name", f"one of {', '.join(OPTIMIZERS)}")
        want(self.learning_rate >= 0, "learning_rate", "0 or more")
        want(self.schedule in SCHEDULES, "schedule", f"one of {', '.join(SCHEDULES)}")
        want(self.warmup_steps >= 0, "warmup_steps", "0 or more")
        want(0 <= self.warmup_ratio < 1, "warmup_ratio", "a value in [0, 1)")
        want(not (self.warmup_ratio and self.warmup_steps), "warmup_ratio", "0 beside warmup_steps")
        want(0 < self.decay_ratio <= 1, "decay_ratio", "a value in (0, 1]")
        want(self.total_steps is None or self.total_steps > 0, "total_steps", "a positive integer")
        want(0 <= self.end_fraction <= 1, "end_fraction", "a value in [0, 1]")
        want(0 <= self.b1 < 1, "b1", "a value in [0, 1)")
        want(0 <= self.b2 < 1, "b2", "a value in [0, 1)")
        want(self.eps > 0, "eps", "a positive number")
        want(0 <= self.momentum < 1, "momentum", "a value in [0, 1)")
        want(self.muon_rms is None or self.muon_rms > 0, "muon_rms", "positive or null")
        want(self.weight_decay >= 0, "weight_decay", "0 or more")
        want(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "positive")
        want(self.moments in MOMENTS, "moments", f"one of {', '.join(MOMENTS)}")
        want(self.ema is None or 0 < self.ema < 1, "ema", "a value in (0, 1), or null")
        uses = bool(self.ema_for) and set(self.ema_for) <= set(USES)
        want(uses, "ema_for", f"one or more of {', '.join(USES)}")
        self._check_patterns(want)
        self._check_together(want)

    def _check_patterns(self, want: Any) -> None:
        for name in ("learning_rates", "weight_decays"):
            check_patterns(getattr(self, name), f"optimizer {name}")
        for value in self.learning_rates.values():
            factor = rate_factor(value, 1.0)
            wanted = 'for each pattern a rate of 0 or more, or a multiple such as "10x"'
            want(factor is not None and 0 <= factor < math.inf, "learning_rates", wanted)
        ok = all(0 <= value < math.inf for value in self.weight_decays.values())
        want(ok, "weight_decays", "0 or more for each pattern")
        rates = any(not isinstance(value, str) for value in self.learning_rates.values())
        want(not rates or self.learning_rate > 0, "learning_rate", "above 0 with learning_rates")

    def _check_together(self, want: Any) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def unused(option: str, without: str) -> None:
            default = defaults[option]
            want(getattr(self, option) == default, option, f"{default!r} {without}")

        for option in dict.fromkeys(option for read in OPTIMIZERS.values() for option in read):
            if option not in OPTIMIZERS[self.name]:
                unused(option, f"with name={self.name!r}, which does not read it")
        if self.schedule != "wsd":
            unused("decay_ratio", "without schedule='wsd'")
        if self.ema is None:
            unused("ema_for", "without ema")
        if self.name == "schedule_free":
            want(self.b1 > 0, "b1", "above 0 with name='schedule_free'")
            want(self.schedule == "constant", "schedule", "'constant' with name='schedule_free'")
            want(self.ema is None, "ema", "null with name='schedule_free', an average already")


def rate_factor(value: float | str, learning_rate: float) -> float | None:
    """A value of `learning_rates` as a multiple of `learning_rate`; None if it is not valid."""
    if not isinstance(value, str):
        return value / learning_rate
    try:
        return float(value[:-1]) if value.endswith("x") else None
    except ValueError:
        return None


def averages_for(config: OptimizerConfig) -> tuple[str, ...]:
    """What an average of the weights stands in for: some of `USES`, () without an average."""
    if config.name == "schedule_free":
        return USES
    return () if config.ema is None else config.ema_for


def _warmup(config: OptimizerConfig) -> int:
    """The number of warm-up updates."""
    if not config.warmup_ratio:
        return config.warmup_steps
    if config.total_steps is None:
        raise ValueError(
            f"optimizer warmup_ratio={config.warmup_ratio} wants total_steps (updates in all); set "
            "it, or give warmup_steps"
        )
    return _rounded_up(config.warmup_ratio, config.total_steps)


def _rounded_up(ratio: float, steps: int) -> int:
    return math.ceil(round(ratio * steps, 6))


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
                f"optimizer.schedule={config.schedule!r} wants total_steps (updates in all); "
                "set it, or use schedule='constant'"
            )
        if config.total_steps <= warmup:
            raise ValueError(
                f"optimizer.warmup_steps={warmup}: wanted fewer than the {config.total_steps} "
                f"updates in all (total_steps, which a run counts from run.steps and its data); "
                f"lower warmup_steps, or train for longer"
            )
        length = config.total_steps - warmup
        if config.schedule == "wsd":
            decay = min(_rounded_up(config.decay_ratio, config.total_steps), length)
            end = peak * config.end_fraction
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, end, decay)],
                [length - decay],
            )
        elif config.schedule == "linear":
            after = optax.linear_schedule(peak, peak * config.end_fraction, length)
        else:
            after = optax.cosine_decay_schedule(peak, length, config.end_fraction)
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def decays(params: Params) -> Any:
    """Which parameters have weight decay: all except norms' scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)


def _in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with float32 gradients, parameters and moments, instead of the parameters' type."""

    def cast(tree: Any) -> Any:
        return optax.tree.cast(tree, jnp.float32)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(lambda params: tx.init(cast(params)), update)


def _decay(config: OptimizerConfig) -> optax.GradientTransformation:
    """Adds weight decay to an update, before the learning rate scales it."""
    if not config.weight_decays:
        return optax.add_decayed_weights(config.weight_decay, decays)

    def default(params: Params) -> Any:
        return jax.tree.map(lambda decayed: config.weight_decay * decayed, decays(params))

    return update_by_pattern(
        config.weight_decays,
        "optimizer weight_decays",
        lambda u, p, decay: u if not decay else u + decay * p,
        default,
    )


def _rate(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Scales an update by the negative learning rate of its parameter."""
    rate = optax.scale_by_learning_rate(schedule)
    if not config.learning_rates:
        return rate
    factors = {
        pattern: rate_factor(value, config.learning_rate)
        for pattern, value in config.learning_rates.items()
    }
    by_pattern = update_by_pattern(
        factors,
        "optimizer learning_rates",
        lambda u, _, factor: u if factor == 1 else factor * u,
        lambda params: jax.tree.map(lambda _: 1.0, params),
    )
    return optax.chain(rate, by_pattern)


def _core(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of this name: direction, weight decay, learning rate."""
    decay, rate = _decay(config), _rate(config, schedule)
    adam = {"b1": config.b1, "b2": config.b2, "eps": config.eps}
    if config.name == "schedule_free":
        # Adam without a first moment: schedule-free's average replaces it.
        direction = optax.scale_by_rms(
            config.b2, config.eps, eps_in_sqrt=False, bias_correction=True
        )
        # optax counts from 1 there and from 0 in the chain; both must use the same rate.
        return optax.contrib.schedule_free(
            optax.chain(direction, decay, rate), lambda count: schedule(count - 1), b1=config.b1
        )
    if config.name == "adafactor":
        direction = scale_by_adafactor()
    elif config.name == "lion":
        direction = optax.scale_by_lion(config.b1, config.b2)
    elif config.name == "sgd":
        direction = optax.trace(config.momentum)
    elif config.name == "muon":
        direction = scale_by_muon(momentum=config.momentum, rms=config.muon_rms, **adam)
    else:
        direction = optax.scale_by_adam(**adam)
    return optax.chain(direction, decay, rate)


def make_optimizer(config: OptimizerConfig | None = None) -> optax.GradientTransformation:
    """Clipping, the named optimizer with its schedule, and optionally an average of the weights.

    bfloat16 weights are rounded stochastically.
    """
    config = OptimizerConfig() if config is None else config
    if not isinstance(config, OptimizerConfig):
        rate = f"(learning_rate={config!r})" if isinstance(config, (int, float)) else "(…)"
        raise ValueError(
            f"make_optimizer: got {config!r}, wanted an OptimizerConfig; write "
            f"ja.make_optimizer(ja.OptimizerConfig{rate})"
        )
    schedule = make_schedule(config)
    if config.moments == "float32":
        core = _in_float32(_core(config, schedule))
    else:
        core = optax.chain(
            scale_by_small_adam(config.moments, config.b1, config.b2, config.eps),
            _decay(config),
            _rate(config, schedule),
        )
    if config.offload:
        core = offload_state(core)
    clip = [] if config.max_grad_norm is None else [optax.clip_by_global_norm(config.max_grad_norm)]
    tx = optax.chain(*clip, core, round_weights_at_random())
    return tx if config.ema is None else with_average(tx, config.ema)
