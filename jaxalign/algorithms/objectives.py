"""What a reward model can learn from: pairs, rankings, grades, or labelled steps.

An objective is a loss on hidden states plus the arrays for evaluating single examples.
`algorithms.reward` picks one and builds a train step from it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithms.by_source import source_of_rows
from jaxalign.algorithms.loss import Entries, Figures, HiddenLoss, Sums, Terms
from jaxalign.algorithms.pairs import Pairs, layout, pair_mask, pair_sources
from jaxalign.losses.graded import squared_error
from jaxalign.losses.masked import as_bool, keep, last_index, weighted
from jaxalign.losses.process import step_bce
from jaxalign.losses.ranking import all_pairs, better, plackett_luce
from jaxalign.losses.reward import bradley_terry
from jaxalign.models.base import ScalarModel
from jaxalign.models.scorer import Scorer
from jaxalign.types import Array, GradedBatch, Params, RankedBatch, StepBatch, TokenBatch

Examples = dict[str, jax.Array]


class Objective(NamedTuple):
    """One way to train a reward model.

    Attributes:
      loss: the loss on hidden states; its `Terms.outputs` are the scores.
      examples: (scores, batch) → arrays with one row per row of the batch: the scores, the labels,
        `mask` for the entries that exist, and `source` if it is recorded.
    """

    loss: HiddenLoss
    examples: Callable[[jax.Array, Any], Examples]


def pairs(scorer: ScalarModel, center_coef: float, label_smoothing: float) -> Objective:
    """`PairBatch`, `SharedPairBatch`: −log σ(r_chosen − r_rejected − margin), averaged over pairs.

    If a pair's prompt is stored once in the row, the two scores are at the ends of its branches.
    """

    def count(batch: Pairs) -> Sums:
        mask = pair_mask(batch)
        return {"preference": weighted(mask, mask, batch.weights).weight}

    def ends(batch: Pairs) -> jax.Array:
        rows = layout(batch)
        return last_index(rows.sides, rows.count)

    def sides(scores: jax.Array, batch: Pairs) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Mask before the arithmetic: a NaN in an empty slot must not reach a gradient.
        mask = pair_mask(batch)
        chosen, rejected = layout(batch).split(scores)
        return keep(chosen, mask), keep(rejected, mask), mask

    def terms(params: Params, hidden: jax.Array, batch: Pairs) -> Terms:
        scores = scorer.scores(params, hidden)  # [R, S]
        chosen, rejected, mask = sides(scores, batch)
        margin = None if batch.margin is None else keep(batch.margin, mask)
        losses = bradley_terry(chosen, rejected, margin, center_coef, label_smoothing)
        metrics = {
            "accuracy": weighted((chosen > rejected).astype(jnp.float32), mask),
            "margin": weighted(chosen - rejected, mask),
            "scores/chosen": weighted(chosen, mask),
            "scores/rejected": weighted(rejected, mask),
        }
        entries = Entries("preference", losses, mask, pair_sources(batch), batch.weights)
        return _terms(entries, metrics, scores)

    def examples(scores: jax.Array, batch: Pairs) -> Examples:
        chosen, rejected, mask = sides(scores, batch)
        arrays = {"chosen": chosen, "rejected": rejected, "mask": mask}
        return _with_source(arrays, pair_sources(batch))

    loss = HiddenLoss(lambda batch: layout(batch).tokens, count, terms, columns=ends)
    return Objective(loss, examples)


def ranking(
    scorer: ScalarModel, kind: str, center_coef: float, label_smoothing: float
) -> Objective:
    """`RankedBatch`: the order of a prompt's answers, averaged over prompts."""

    def order(batch: RankedBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which answers exist, which answer beats which (`[B, K, K]`), and which rows rank any."""
        exists = as_bool(batch.mask)
        pairs = better(batch.ranks, exists)  # [B, K, K]
        return exists, pairs, jnp.any(pairs, axis=(1, 2))

    def count(batch: RankedBatch) -> Sums:
        return {"preference": jnp.sum(order(batch)[2], dtype=jnp.float32)}

    def tokens(batch: RankedBatch) -> TokenBatch:
        # [B, K, T] -> [B · K, T]: all answers to a prompt stay on the device of its row.
        return jax.tree.map(lambda x: jnp.reshape(x, (-1, x.shape[-1])), batch.answers)

    def source(batch: RankedBatch) -> jax.Array | None:
        return source_of_rows(jax.tree.map(lambda x: x[:, 0], batch.answers))

    def terms(params: Params, hidden: jax.Array, batch: RankedBatch) -> Terms:
        outputs = scorer.scores(params, hidden).reshape(batch.mask.shape)  # [B · K, 1] → [B, K]
        exists, pairs, ranked = order(batch)
        scores = keep(outputs, exists)
        if kind == "plackett_luce":
            losses = plackett_luce(scores, batch.ranks, exists)
        else:
            losses = all_pairs(scores, batch.ranks, exists, center_coef, label_smoothing)
        gaps = scores[:, :, None] - scores[:, None, :]
        metrics = {
            "accuracy": weighted((gaps > 0).astype(jnp.float32), pairs),
            "margin": weighted(gaps, pairs),
            "best": weighted(_best_first(scores, batch.ranks, exists), ranked),
            "scores/mean": weighted(scores, exists),
        }
        return _terms(Entries("preference", losses, ranked, source(batch)), metrics, outputs)

    def examples(scores: jax.Array, batch: RankedBatch) -> Examples:
        exists, _, ranked = order(batch)
        arrays = {
            "scores": keep(scores, exists),
            "ranks": keep(batch.ranks, exists),
            "best": _best_first(keep(scores, exists), batch.ranks, exists),
            "mask": exists,
            "says": ranked,
        }
        return _with_source(arrays, source(batch))

    def ends(batch: RankedBatch) -> jax.Array:
        return last_index(tokens(batch).segment_ids, 1)

    return Objective(HiddenLoss(tokens, count, terms, columns=ends), examples)


def regression(scorer: Scorer) -> Objective:
    """`GradedBatch`: squared errors, averaged over the grades that were given."""

    def count(batch: GradedBatch) -> Sums:
        return {"mse": jnp.sum(as_bool(batch.mask), dtype=jnp.float32)}

    def terms(params: Params, hidden: jax.Array, batch: GradedBatch) -> Terms:
        scores = scorer.outputs(params, hidden)[:, 0]  # [B, 1, A] → [B, A]
        if batch.mask.shape[1] != len(scorer.attributes):
            raise ValueError(
                f"a batch with {batch.mask.shape[1]} grades an answer, for a reward model with the "
                f"attributes {', '.join(scorer.attributes)}; make both with the same attributes"
            )
        mask = as_bool(batch.mask)
        errors = squared_error(keep(scores, mask), keep(batch.scores, mask))
        metrics = {}
        for column, name in enumerate(scorer.attributes):
            given = mask[:, column]
            metrics[f"mse/{name}"] = weighted(errors[:, column], given)
            metrics[f"scores/{name}"] = weighted(scores[:, column], given)
        source = source_of_rows(batch.tokens)
        if source is not None:
            source = jnp.broadcast_to(source[:, None], mask.shape)  # [B] -> [B, A]
        return _terms(Entries("mse", errors, mask, source), metrics, scores)

    def examples(scores: jax.Array, batch: GradedBatch) -> Examples:
        mask = as_bool(batch.mask)
        arrays = {"scores": keep(scores, mask), "grades": keep(batch.scores, mask), "mask": mask}
        return _with_source(arrays, source_of_rows(batch.tokens))

    def ends(batch: GradedBatch) -> jax.Array:
        return last_index(batch.tokens.segment_ids, 1)

    loss = HiddenLoss(lambda batch: batch.tokens, count, terms, columns=ends)
    return Objective(loss, examples)


def steps(scorer: ScalarModel) -> Objective:
    """`StepBatch`: binary cross-entropy at the end of each step, averaged over steps."""

    def count(batch: StepBatch) -> Sums:
        return {"steps": jnp.sum(as_bool(batch.mask), dtype=jnp.float32)}

    def terms(params: Params, hidden: jax.Array, batch: StepBatch) -> Terms:
        outputs, mask = scorer.scores(params, hidden), as_bool(batch.mask)  # [B, T]
        scores, labels = keep(outputs, mask), keep(batch.labels, mask)
        losses = step_bce(scores, labels)
        right = (scores > 0) == (labels >= 0.5)
        metrics = {
            "accuracy": weighted(right.astype(jnp.float32), mask),
            "probability": weighted(jax.nn.sigmoid(scores), mask),
        }
        return _terms(Entries("steps", losses, mask, batch.tokens.source_ids), metrics, outputs)

    def examples(scores: jax.Array, batch: StepBatch) -> Examples:
        mask = as_bool(batch.mask)
        arrays = {"scores": keep(scores, mask), "labels": keep(batch.labels, mask), "mask": mask}
        return _with_source(arrays, batch.tokens.source_ids)

    return Objective(HiddenLoss(lambda batch: batch.tokens, count, terms), examples)


def _terms(entries: Entries, metrics: Figures, scores: jax.Array) -> Terms:
    total = weighted(entries.losses, entries.mask, entries.weights).total
    return Terms({entries.name: total}, metrics, entries, scores)


def _with_source(arrays: Examples, source: Array | None) -> Examples:
    return arrays if source is None else arrays | {"source": jnp.asarray(source)}


def _best_first(scores: jax.Array, ranks: Array, exists: jax.Array) -> jax.Array:
    """`[B]`: 1 where the answer with the highest score is one of those with the highest rank."""
    top = jnp.max(jnp.where(exists, ranks, -jnp.inf), axis=1, keepdims=True)
    pick = jnp.argmax(jnp.where(exists, scores, -jnp.inf), axis=1)[:, None]
    return (jnp.take_along_axis(jnp.asarray(ranks), pick, 1) == top)[:, 0].astype(jnp.float32)
