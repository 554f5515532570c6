"""Supervised fine-tuning: maximum likelihood of the answers' tokens.

    L = − Σ_{b,t} m_{b,t} · log π(y_{b,t} | x_{b,≤t}) / Σ_{b,t} m_{b,t}

(Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, step 1), with m the loss mask: every token
of every answer weighs the same, over all micro-batches and devices.

Batch: `TokenBatch`, all arrays `[B, T]`, padded or packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import optax

from jaxalign.algorithms.by_source import by_source
from jaxalign.algorithms.step import Loss, Step
from jaxalign.algorithms.step import make_step as _make_step
from jaxalign.losses.masked import weighted
from jaxalign.losses.sft import nll
from jaxalign.models.base import LanguageModel, read, read_counts
from jaxalign.models.lm_head import target_sum
from jaxalign.types import Array, Params, TokenBatch, Weighted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Options of SFT.

    Attributes:
      log_entropy: also log the mean entropy of the predictions (`entropy`, nats); costs another
        pass over each chunk of logits.
    """

    log_entropy: bool = False


def make_loss(
    model: LanguageModel, config: Config | None = None, *, sources: Sequence[str] = ()
) -> Loss:
    """The SFT loss: `nll` weighted by trained tokens, and what the model itself adds (`read`).

    With several `sources`, the names of `batch.source_ids`, also `nll/<source>` of each.
    """
    config = Config() if config is None else config

    def count(batch: TokenBatch) -> dict[str, Array]:
        trained = jnp.sum(batch.loss_mask, dtype=jnp.float32)
        return {"nll": trained, **read_counts(model, batch)}

    def terms(params: Params, batch: TokenBatch) -> tuple[dict[str, Array], dict[str, Weighted]]:
        hidden, extra = read(model, params, batch)
        found = target_sum(
            model, params, hidden, batch.targets, batch.loss_mask, entropy=config.log_entropy
        )
        metrics = dict(extra)
        if found.entropy is not None:
            metrics["entropy"] = weighted(found.entropy, batch.loss_mask)
        losses = nll(found.logprobs)
        metrics |= by_source("nll", losses, batch.loss_mask, batch.source_ids, sources)
        return {"nll": -found.total} | {name: term.total for name, term in extra.items()}, metrics

    return Loss(count, terms)


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
