"""Supervised fine-tuning: maximum likelihood of the answers' tokens.

    L = − Σ_{b,t} m_{b,t} · log π(y_{b,t} | x_{b,≤t}) / Σ_{b,t} m_{b,t}

(Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, step 1), with m the loss mask: every token of
every answer weighs the same, over all micro-batches and devices. `loss_type="dft"` weighs each
token's term by its own probability (Wu et al. 2025, https://arxiv.org/abs/2508.05629). With
`TokenBatch.weights` w, m·w replaces m.

Batch: `TokenBatch`, all arrays `[B, T]`, padded or packed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import optax

from jaxalign.algorithms import neftune
from jaxalign.algorithms.by_source import by_source
from jaxalign.algorithms.loss import Entries, HiddenLoss, Loss, Sums, Terms, with_model_terms
from jaxalign.algorithms.step import Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses.masked import weighted
from jaxalign.losses.sft import dft, nll
from jaxalign.models.base import LanguageModel
from jaxalign.models.lm_head import target_logprobs, target_sum
from jaxalign.types import Array, Params, TokenBatch

LOSS_TYPES = ("nll", "dft")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SFT.

    Attributes:
      loss_type: "nll", or "dft" (dynamic fine-tuning): each token's term is weighted by the token's
        probability, so that a few unlikely tokens do not dominate the gradient; see
        `losses.sft.dft`.
      log_entropy: also log the mean entropy of the predictions (`entropy`, nats); costs another
        pass over each chunk of logits.
      neftune_alpha: α of the noise on the embeddings of training batches, see docs/optimizers.md;
        5 to 15 in the paper. None: no noise.
    """

    loss_type: str = "nll"
    log_entropy: bool = False
    neftune_alpha: float | None = None

    def __post_init__(self):
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"sft loss_type={self.loss_type!r}: wanted one of {', '.join(LOSS_TYPES)}"
            )
        if self.neftune_alpha is not None and not 0 < self.neftune_alpha < math.inf:
            raise ValueError(
                f"sft neftune_alpha={self.neftune_alpha}: wanted a positive number, or null"
            )


def token_weight(tokens: TokenBatch) -> Array:
    """Σ m · w, the total weight of the trained tokens of a batch: a float32 scalar."""
    return weighted(tokens.loss_mask, tokens.loss_mask, tokens.weights).weight


def add_noise(batch: TokenBatch, config: Config, seed: Sequence[int]) -> TokenBatch:
    """Adds NEFTune's noise to a training batch, if configured. Do not use it on held-out data.

    Args:
      batch: the batch, in numpy.
      config: the options, with `neftune_alpha`.
      seed: non-negative integers, unique to the update, such as (seed of the run, update).
    """
    if config.neftune_alpha is None:
        return batch
    return neftune.add_noise(batch, config.neftune_alpha, seed)


def make_loss(
    model: LanguageModel, config: Config | None = None, *, sources: Sequence[str] = ()
) -> Loss:
    """The SFT loss: `nll` or `dft`, averaged over trained tokens.

    With several `sources` (the names for `batch.source_ids`), it also logs `nll/<source>`. With
    `dft`, the likelihood is logged as the metric `nll`.
    """
    config = Config() if config is None else config

    def count(batch: TokenBatch) -> Sums:
        return {config.loss_type: token_weight(batch)}

    def dft_terms(params: Params, hidden: jax.Array, batch: TokenBatch) -> Terms:
        mask = batch.loss_mask
        arguments, metrics = (model, params, hidden, batch.targets), {}
        if config.log_entropy:
            logprobs, entropy = target_logprobs(
                *arguments, entropy=True, entropy_gradient=False, mask=mask
            )
            metrics["entropy"] = weighted(entropy, mask)
        else:
            logprobs = target_logprobs(*arguments, mask=mask)
        metrics["nll"] = weighted(nll(logprobs), mask)
        entries = Entries("nll", nll(logprobs), mask, batch.source_ids, batch.weights)
        return Terms({"dft": weighted(dft(logprobs), mask, batch.weights).total}, metrics, entries)

    def nll_terms(params: Params, hidden: jax.Array, batch: TokenBatch) -> Terms:
        mask = batch.loss_mask
        target = target_sum(
            model,
            params,
            hidden,
            batch.targets,
            mask,
            weights=batch.weights,
            entropy=config.log_entropy,
        )  # log π of the targets, [B, T], and Σ m · w · log π
        entropy = target.entropy
        return Terms(
            {"nll": -target.total},
            {} if entropy is None else {"entropy": weighted(entropy, mask)},
            Entries("nll", nll(target.logprobs), mask, batch.source_ids, batch.weights),
        )

    terms = nll_terms if config.loss_type == "nll" else dft_terms
    loss = HiddenLoss(lambda batch: batch, count, terms, token_weights=True)
    return with_model_terms(by_source(loss, sources), model)


def make_step(
    model: LanguageModel,
    tx: optax.GradientTransformation,
    config: Config | None = None,
    *,
    micro_batches: int = 1,
    sources: Sequence[str] = (),
) -> Step:
    """`step(state, batch: TokenBatch) -> (state, metrics)`; see `algorithms.step.make_step`."""
    return _make_step(make_loss(model, config, sources=sources), tx, micro_batches)
