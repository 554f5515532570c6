"""What each token and row contributes to an update: its loss and its gradient.

    g_t = ‖∂L / ∂h_t‖₂

L is the loss of the whole update and h_t the hidden state after the final norm at position t,
through which the gradient of all lower weights passes. It costs a forward pass of the model and a
backward pass of the head. A row's figures are the algorithm's own metrics for a batch in which only
that row counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms import dpo, kto, objectives, sft
from jaxalign.algorithms.loss import Loss, with_model_terms
from jaxalign.algorithms.ppo.loss import policy_loss
from jaxalign.commands.explain.units import only, read_rows
from jaxalign.losses import aggregate
from jaxalign.losses import ppo as ppo_losses
from jaxalign.losses.dpo import needs_whole_batch
from jaxalign.losses.masked import keep
from jaxalign.models.base import combine, read
from jaxalign.models.lm_head import target_logprobs
from jaxalign.parallel.sharding import shard_batch
from jaxalign.run.config.runs import DPORun, KTORun, PPORun, RewardRun, SFTRun
from jaxalign.types import Params, RolloutBatch, TokenBatch, TrainState, Weighted

Figures = dict[str, np.ndarray]


class GivenHidden:
    """A model with given hidden states, from which a loss starts.

    Args:
      model: a `LanguageModel` or `ScalarModel`, for its head.
      hidden: `[R, T, D]`.
    """

    extra_terms = ()

    def __init__(self, model: Any, hidden: jax.Array):
        self._model, self._hidden = model, hidden

    def apply(self, params: Params, inputs: Any, *_: Any, **__: Any) -> jax.Array:
        """The given hidden states, whatever the input."""
        return self._hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class Kind(NamedTuple):
    """How to measure an algorithm's rows.

    Attributes:
      model: the model that reads them.
      loss: (model) → its loss.
      part: the model's key in the parameters; None: they are its own.
      language: whether the loss is on log-probabilities, otherwise on scores.
      by_row: whether rows have their own figures, besides their tokens' figures.
      separable: whether the loss of a row does not depend on other rows.
      options: PPO's options.
    """

    model: Any
    loss: Callable[[Any], Loss]
    part: str | None = None
    language: bool = True
    by_row: bool = True
    separable: bool = True
    options: Any = None


class Measured(NamedTuple):
    """One update, on the host.

    Attributes:
      tokens: the rows that the model read, `[R, T]`.
      loss: the loss of the whole update, without the model's own terms.
      values: name → `[R, T]`, aligned with the targets (with the inputs for losses of scores).
      figures: name → `[U]`, for each unit; NaN if nothing in it counts.
    """

    tokens: TokenBatch
    loss: float
    values: Figures
    figures: Figures


def kind_of(config: Any, parts: Any) -> Kind | None:
    """How to measure a run's updates; None for an algorithm from outside the package.

    Args:
      config: the run's config.
      parts: models and step, from the run's builder.
    """
    model = parts.policy
    if isinstance(config, SFTRun):
        return Kind(model, lambda given: sft.make_loss(given, config.sft), by_row=False)
    if isinstance(config, DPORun):
        separable = not needs_whole_batch(config.dpo.types)
        return Kind(model, lambda given: dpo.make_loss(given, config.dpo), separable=separable)
    if isinstance(config, KTORun):
        return Kind(model, lambda given: kto.make_loss(given, config.kto))
    if isinstance(config, RewardRun):
        return Kind(model, lambda given: _reward_loss(given, config.reward), language=False)
    if isinstance(config, PPORun):
        options = parts.options
        return Kind(
            model,
            lambda given: with_model_terms(policy_loss(given, options), given, part="policy"),
            part="policy",
            by_row=False,
            options=options,
        )
    return None


def _reward_loss(scorer: Any, config: Any) -> Loss:
    center, smoothing = config.center_coef, config.label_smoothing
    if config.objective == "regression":
        objective = objectives.regression(scorer)
    elif config.objective == "steps":
        objective = objectives.steps(scorer)
    elif config.objective == "ranking":
        objective = objectives.ranking(scorer, config.ranking, center, smoothing)
    else:
        objective = objectives.pairs(scorer, center, smoothing)
    return with_model_terms(objective.loss, scorer)


class Measure:
    """Measures updates; its two programs are each compiled once per shape.

    Args:
      kind: see `kind_of`.
      mesh: the run's mesh.
    """

    def __init__(self, kind: Kind, mesh: Mesh):
        self.kind, self._mesh = kind, mesh
        self._tokens, self._rows = jax.jit(self._of_tokens), jax.jit(self._of_rows)

    def __call__(self, state: TrainState, batch: Any, units: list[tuple[int, int]]) -> Measured:
        """Measures one update.

        Args:
          state: before it.
          batch: its batch, after `prepare`.
          units: (row, segment) of each document, pair or answer.
        """
        batch = shard_batch(batch, self._mesh)
        params = combine(state.params, state.frozen)
        figures: Figures = {}
        with jax.set_mesh(self._mesh):
            hidden, *seen = self._tokens(params, batch)
            if self.kind.by_row and units:
                found = self._rows(params, batch, hidden, np.asarray(units, np.int32))
                figures = {name: _means(value) for name, value in jax.device_get(found).items()}
        tokens, loss, values = jax.device_get(seen)
        return Measured(tokens, float(loss), values, figures)

    def _of_tokens(self, params: Params, batch: Any) -> tuple[Any, ...]:
        kind = self.kind
        own = params if kind.part is None else params[kind.part]
        tokens = read_rows(batch)
        hidden, _ = read(kind.model, own, tokens)

        def total(hidden: jax.Array) -> jax.Array:
            loss = kind.loss(GivenHidden(kind.model, hidden))
            return jnp.asarray(_divided(loss, params, batch), jnp.float32)

        loss, gradient = jax.value_and_grad(total)(hidden)
        norms = jnp.sqrt(jnp.sum(jnp.square(gradient.astype(jnp.float32)), axis=-1))
        values = {"gradient": norms}
        if kind.language:
            temperature = _temperature(kind, batch)
            mask = tokens.loss_mask
            new = target_logprobs(kind.model, own, hidden, tokens.targets, temperature, mask=mask)
            values["loss"] = -new
            if isinstance(batch, RolloutBatch):
                values |= _of_rollout(new, batch, kind.options)
        return hidden, tokens, loss, values

    def _of_rows(
        self, params: Params, batch: Any, hidden: jax.Array, units: jax.Array
    ) -> dict[str, Weighted]:
        loss = self.kind.loss(GivenHidden(self.kind.model, hidden))

        def one(unit: jax.Array) -> dict[str, Weighted]:
            alone = only(batch, unit[0], unit[1])
            _, metrics = loss.terms(params, alone)
            if not self.kind.separable:
                return metrics
            value = jnp.asarray(_divided(loss, params, alone), jnp.float32)
            counted = sum(jnp.asarray(count, jnp.float32) for count in loss.count(alone).values())
            # 1 · value: a loss is already in nats, and a row that counts has weight 1.
            weight = (jnp.asarray(counted) > 0).astype(jnp.float32)
            return metrics | {"loss": Weighted(value * weight, weight)}

        return jax.lax.map(one, units)


def _divided(loss: Loss, params: Params, batch: Any) -> Any:
    sums, _ = loss.terms(params, batch)
    counts = loss.count(batch)
    return sum(Weighted(total, counts[name]).mean() for name, total in sums.items())


def _means(figure: Weighted) -> np.ndarray:
    """Means of `[U]` sums; NaN where the weight is 0."""
    total, weight = np.asarray(figure.total, np.float64), np.asarray(figure.weight, np.float64)
    return np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)


def _temperature(kind: Kind, batch: Any) -> Any:
    """The divisor of the logits: 1 except in PPO."""
    if not isinstance(batch, RolloutBatch):
        return 1.0
    if batch.temperature is None:
        return kind.options.temperature
    return jnp.max(jnp.asarray(batch.temperature))


def _of_rollout(new: jax.Array, batch: RolloutBatch, options: Any) -> dict[str, jax.Array]:
    """Per-token values of PPO: log π/π_old, and where the objective is clipped."""
    mask = batch.tokens.loss_mask
    log_ratio = keep(new, mask) - keep(batch.old_logprobs, mask)
    if options.importance_sampling_level == "sequence":
        log_ratio = aggregate.answer_mean(log_ratio, batch.tokens)
    advantages = keep(batch.advantages, mask)
    clipped = ppo_losses.policy_loss(
        log_ratio,
        jnp.zeros_like(log_ratio),
        advantages,
        clip_range=options.clip_range,
        clip_range_high=options.clip_range_high,
        dual_clip=options.dual_clip,
    )
    most = ppo_losses.MAX_LOG_RATIO
    plain = -advantages * jnp.exp(jnp.clip(log_ratio, -most, most))
    return {"log_ratio": log_ratio, "clipped": (clipped > plain).astype(jnp.float32)}
