"""Direct preference optimisation: a preference loss on the policy itself, without a reward model.

    L = − log σ(β · (log π(y_c|x)/π_ref(y_c|x) − log π(y_r|x)/π_ref(y_r|x)))

averaged over pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 7); other
forms by `loss_type`, see `losses.preference`. The frozen reference runs only in `prepare`: the step
holds one model. SimPO, ORPO and CPO have no reference, and no `prepare`.

Batch: `PairBatch` or `SharedPairBatch`, with `ref_*_logps` added by `prepare`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax.core import FrozenDict

from jaxalign.algorithms.by_source import by_source
from jaxalign.algorithms.loss import Entries, HiddenLoss, Loss, Sums, Terms, with_model_terms
from jaxalign.algorithms.pairs import (
    Answers,
    Pairs,
    answers_of,
    layout,
    pair_mask,
    pair_sources,
    read_answers,
)
from jaxalign.algorithms.prepare import Prepare
from jaxalign.algorithms.step import Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses.dpo import (
    as_types,
    as_weights,
    check_options,
    needs_reference,
    needs_whole_batch,
    preference_loss,
)
from jaxalign.losses.masked import keep, weighted
from jaxalign.losses.preference import chosen_nll, option_names
from jaxalign.losses.tokens import check_ld_alpha
from jaxalign.models.base import LanguageModel
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, shard_batch, use_mesh
from jaxalign.types import PairBatch, Params, SharedPairBatch

AnyPairs = TypeVar("AnyPairs", PairBatch, SharedPairBatch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of DPO. An option without effect on the chosen `loss_type` is an error.

    Attributes:
      beta: β > 0, how closely the policy is held to the reference (τ in IPO, λ in ORPO).
      loss_type: one loss, or several to be added up; see `losses.preference`.
      loss_weights: one weight per loss type, if there are several; None: 1 each.
      label_smoothing: in [0, 0.5): the assumed fraction of flipped labels, for the types that use
        it.
      ipo_normalize: `ipo` only: divide log-ratios by answer length, as TRL does.
      f_divergence: the divergence between policy and reference, see `losses.divergence`.
      f_alpha: α of `f_divergence="alpha_divergence"`.
      discopop_tau: `discopop` only: temperature of the switch between its halves.
      simpo_gamma: `simpo` only: the margin γ ≥ 0.
      loss_options: by name, options without a field here, for losses that were added with
        `losses.preference.register`.
      ld_alpha: in [0, 1]: the weight, in log-ratios, of tokens beyond the shorter answer's length
        (LD-DPO, see `losses.tokens`); None: 1.
      wpo_weighting: multiply a pair's loss by how likely its answers are under the policy (WPO,
        see `losses.tokens`).
      sft_coef: weight of the chosen answers' negative log-likelihood per token, which is added to
        the loss. None: as published, 1 for `orpo` and `cpo`, 0 for the others.
    """

    beta: float = 0.1
    loss_type: str | tuple[str, ...] = "sigmoid"
    loss_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ipo_normalize: bool = True
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    discopop_tau: float = 0.05
    simpo_gamma: float = 0.5
    loss_options: Mapping[str, float | bool | str] = FrozenDict()
    ld_alpha: float | None = None
    wpo_weighting: bool = False
    sft_coef: float | None = None

    def __post_init__(self):
        if not isinstance(self.loss_type, str):
            object.__setattr__(self, "loss_type", tuple(self.loss_type))
        object.__setattr__(self, "loss_options", FrozenDict(self.loss_options))
        for name, value in self.loss_options.items():
            if hasattr(type(self), name):
                raise ValueError(
                    f"loss_options {name}={value!r}: wanted options without a field of their own; "
                    f"set {name} itself"
                )
        # The loss checks its options before any data is read.
        check_options(
            loss_type=self.loss_type, loss_weights=self.loss_weights, **_loss_options(self)
        )
        compared = set(self.types) - {"sft"}
        if self.ld_alpha is not None:
            check_ld_alpha(self.ld_alpha)
            if not compared or not self.has_reference:
                raise ValueError(
                    f"ld_alpha={self.ld_alpha} has no effect on loss_type={self.loss_type!r}, "
                    "which has no log-ratios; leave it out"
                )
        if self.wpo_weighting and (not compared or needs_whole_batch(self.types)):
            raise ValueError(
                f"wpo_weighting=True with loss_type={self.loss_type!r}: it weights pairs, and this "
                "loss has none of its own; leave it out"
            )
        if self.sft_coef is not None:
            if not self.sft_coef >= 0:
                raise ValueError(f"sft_coef={self.sft_coef}: wanted a number ≥ 0, or None")
            if "sft" in self.types:
                raise ValueError(
                    f"sft_coef={self.sft_coef} beside loss_type={self.loss_type!r}: both are the "
                    "same term; say it once, in loss_weights or here"
                )

    @property
    def types(self) -> tuple[str, ...]:
        """`loss_type` as a tuple."""
        return as_types(self.loss_type)

    @property
    def has_reference(self) -> bool:
        """Whether the loss uses a reference, so that batches need `make_prepare`."""
        return needs_reference(self.types)

    @property
    def sft_weight(self) -> float:
        """The weight of the negative log-likelihood per token in the loss."""
        if self.sft_coef is not None:
            return self.sft_coef
        weights = as_weights(self.types, self.loss_weights)
        added = dict(zip(self.types, weights, strict=True)).get("sft", 0.0)
        return added + (1.0 if set(self.types) & {"orpo", "cpo"} else 0.0)


def _loss_options(config: Config) -> dict[str, Any]:
    """The config's fields that are arguments of `preference_loss`, by name."""
    fields = {name: getattr(config, name) for name in option_names() if hasattr(config, name)}
    return {
        "beta": config.beta,
        "f_divergence": config.f_divergence,
        "f_alpha": config.f_alpha,
        **fields,
        **config.loss_options,
    }


def pair_logps(
    model: LanguageModel, params: Params, batch: Pairs, *, ld_alpha: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities of both answers, Σ_t m_t · log π(y_t|·): `[B]` or `[B, S]`."""
    answers = read_answers(model, params, batch, ld_alpha=ld_alpha)
    return answers.chosen, answers.rejected


def make_prepare(
    model: LanguageModel, config: Config | None = None
) -> Prepare[[Params, AnyPairs], AnyPairs]:
    """Builds `prepare(ref_params, batch) -> batch` with the reference's log-probabilities added.

    The reference may be any parameters of `model`. It never changes, so run `prepare` once and keep
    the result, or run it once per epoch.

    Args:
      model: the reference.
      config: the step's config; its `ld_alpha` applies to the reference too.

    Raises:
      ValueError: the loss has no reference.
    """
    config = Config() if config is None else config
    if not config.has_reference:
        raise ValueError(f"loss_type={config.loss_type!r} has no reference; nothing to prepare")
    ld_alpha = config.ld_alpha

    @jax.jit
    def logps(ref_params: Params, batch: Pairs) -> tuple[jax.Array, jax.Array]:
        return pair_logps(model, on_device(ref_params), batch, ld_alpha=ld_alpha)

    def prepare(ref_params: Params, batch: AnyPairs) -> AnyPairs:
        mesh = mesh_of(ref_params)
        if mesh is not None:
            batch = shard_batch(batch, mesh)
        with use_mesh(mesh):
            chosen, rejected = logps(ref_params, batch)
        return batch._replace(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

    def lower(ref_params: Params, batch: Pairs) -> jax.stages.Lowered:
        with use_mesh(mesh_of(ref_params)):
            return logps.lower(ref_params, batch)

    return Prepare(prepare, lower, ("ref_params", "batch"))


def make_loss(
    model: LanguageModel, config: Config | None = None, *, sources: Sequence[str] = ()
) -> Loss:
    """The DPO loss: `preference` is averaged over pairs, `sft` over the chosen answers' tokens.

    With several `sources` (the names for the rows' `source_ids`), it also logs
    `preference/<source>`.
    """
    config = Config() if config is None else config
    sft_weight = config.sft_weight

    def count(batch: Pairs) -> Sums:
        mask = pair_mask(batch)
        counts: Sums = {"preference": weighted(mask, mask, batch.weights).weight}
        if sft_weight:
            counts["sft"] = weighted(layout(batch).lengths()[0], mask, batch.weights).total
        return counts

    def terms(params: Params, hidden: jax.Array, batch: Pairs) -> Terms:
        mask = pair_mask(batch)
        reference = _reference_logps(batch, mask) if config.has_reference else (None, None)
        answers = answers_of(
            model,
            params,
            hidden,
            batch,
            ld_alpha=config.ld_alpha,
            wpo_weighting=config.wpo_weighting,
        )
        losses, chosen_rewards, rejected_rewards = _pair_losses(config, answers, reference, mask)
        values = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).astype(jnp.float32),
            "logps/chosen": answers.chosen,
            "logps/rejected": answers.rejected,
        }
        if answers.weights is not None:
            values["weights"] = answers.weights
        metrics = {name: weighted(value, mask) for name, value in values.items()}
        sums: Sums = {"preference": weighted(losses, mask, batch.weights).total}
        if sft_weight:
            metrics["nll"] = chosen_nll(answers.plain_chosen, answers.chosen_lengths, mask)
            sums["sft"] = -sft_weight * weighted(answers.plain_chosen, mask, batch.weights).total
        entries = Entries("preference", losses, mask, pair_sources(batch), batch.weights)
        return Terms(sums, metrics, entries)

    loss = HiddenLoss(lambda batch: layout(batch).tokens, count, terms)
    return with_model_terms(by_source(loss, sources), model)


def _reference_logps(batch: Pairs, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The reference's log-probabilities of both answers, 0 where there is no pair."""
    if batch.ref_chosen_logps is None or batch.ref_rejected_logps is None:
        raise ValueError(
            "the DPO batch has no ref_chosen_logps / ref_rejected_logps; "
            "add them with dpo.make_prepare(model)(ref_params, batch)"
        )
    return keep(batch.ref_chosen_logps, mask), keep(batch.ref_rejected_logps, mask)


def _pair_losses(
    config: Config,
    answers: Answers,
    reference: tuple[jax.Array | None, jax.Array | None],
    mask: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`preference_loss` without its `sft` part: (losses, chosen rewards, rejected rewards).

    The `sft` part is an average over tokens, not pairs, so it is a separate term.
    """
    weights = zip(config.types, as_weights(config.types, config.loss_weights), strict=True)
    pairwise = {name: weight for name, weight in weights if name != "sft"}
    losses, chosen_rewards, rejected_rewards = preference_loss(
        answers.chosen,
        answers.rejected,
        *reference,
        loss_type=tuple(pairwise) or "sigmoid",  # for the rewards
        loss_weights=tuple(pairwise.values()) or None,
        chosen_lengths=answers.chosen_lengths,
        rejected_lengths=answers.rejected_lengths,
        pair_weights=answers.weights,
        mask=mask,
        **_loss_options(config),
    )
    return losses if pairwise else jnp.zeros_like(losses), chosen_rewards, rejected_rewards


def make_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
    sources: Sequence[str] = (),
) -> Step:
    """`step(state, batch) -> (state, metrics)`; see `algorithms.step.make_step`.

    Raises:
      ValueError: several micro-batches with a loss that sorts the whole batch (`aot`).
    """
    config = Config() if config is None else config
    check_micro_batches(config, micro_batches)
    return _make_step(make_loss(model, config, sources=sources), tx, micro_batches)


def check_micro_batches(config: Config, micro_batches: int) -> None:
    """Raises ValueError if a loss that sorts the whole batch is to be split into micro-batches."""
    if micro_batches > 1 and needs_whole_batch(config.types):
        raise ValueError(
            f"micro_batches={micro_batches} with loss_type={config.loss_type!r}: it compares all "
            "pairs of a batch with one another; use micro_batches=1 (and more devices, or fewer "
            "rows)"
        )
