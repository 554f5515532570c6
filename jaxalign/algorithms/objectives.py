"""What a reward model can be taught from: pairs, rankings, grades, or labelled steps.

Each objective says which rows the model reads (`tokens`), where scores are taken (`score`), how
they are judged (`judge`), and what a look at held-out data wants to know of every example
(`examples`). `algorithms.reward` picks one and makes a train step of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.algorithms.by_source import by_source, source_of_sequences
from jaxalign.algorithms.pairs import Pairs, layout, pair_mask, pair_sources
from jaxalign.losses.graded import squared_error
from jaxalign.losses.masked import as_bool, keep, weighted
from jaxalign.losses.process import step_bce
from jaxalign.losses.ranking import all_pairs, better, plackett_luce
from jaxalign.losses.reward import bradley_terry
from jaxalign.models.base import ScalarModel
from jaxalign.models.scorer import Scorer, last_hidden
from jaxalign.types import Array, GradedBatch, Params, RankedBatch, StepBatch, TokenBatch, Weighted

Sums = tuple[dict[str, Array], dict[str, Weighted]]
Examples = dict[str, jax.Array]


class Objective(NamedTuple):
    """One way to teach a reward model.

    Attributes:
      count: batch → `{term: weight}`; reads masks only.
      tokens: batch → the rows that the model reads.
      score: (parameters, hidden states, batch) → the scores of that batch.
      judge: (scores, batch) → (`{term: sum}`, `{metric: Weighted}`).
      examples: (scores, batch) → arrays with a row for each row of the batch: the scores, what they
        are to be compared with, `mask` for those that exist, and `source` where it is known.
    """

    count: Callable[[Any], dict[str, Array]]
    tokens: Callable[[Any], TokenBatch]
    score: Callable[[Params, jax.Array, Any], jax.Array]
    judge: Callable[[jax.Array, Any], Sums]
    examples: Callable[[jax.Array, Any], Examples]


def pairs(
    scorer: ScalarModel, center_coef: float, label_smoothing: float, sources: Sequence[str] = ()
) -> Objective:
    """`PairBatch`, `SharedPairBatch`: −log σ(r_chosen − r_rejected − margin), averaged over pairs.

    A pair whose prompt stands in the row once has its two scores at the ends of its branches.
    """

    def count(batch: Pairs) -> dict[str, Array]:
        return {"preference": jnp.sum(pair_mask(batch), dtype=jnp.float32)}

    def score(params: Params, hidden: jax.Array, batch: Pairs) -> jax.Array:
        where = layout(batch)
        return scorer.scores(params, last_hidden(hidden, where.sides, where.count))

    def sides(scores: jax.Array, batch: Pairs) -> tuple[jax.Array, jax.Array, jax.Array]:
        # Masked before the arithmetic: what stands in an empty slot must not reach a gradient.
        mask = pair_mask(batch)
        chosen, rejected = layout(batch).split(scores)
        return keep(chosen, mask), keep(rejected, mask), mask

    def judge(scores: jax.Array, batch: Pairs) -> Sums:
        chosen, rejected, mask = sides(scores, batch)
        margin = None if batch.margin is None else keep(batch.margin, mask)
        losses = bradley_terry(chosen, rejected, margin, center_coef, label_smoothing)
        chosen, rejected = jax.lax.stop_gradient((chosen, rejected))
        metrics = {
            "accuracy": weighted((chosen > rejected).astype(jnp.float32), mask),
            "margin": weighted(chosen - rejected, mask),
            "scores/chosen": weighted(chosen, mask),
            "scores/rejected": weighted(rejected, mask),
        }
        metrics |= by_source("preference", losses, mask, pair_sources(batch), sources)
        return {"preference": weighted(losses, mask).total}, metrics

    def examples(scores: jax.Array, batch: Pairs) -> Examples:
        chosen, rejected, mask = sides(scores, batch)
        seen = {"chosen": chosen, "rejected": rejected, "mask": mask}
        known = pair_sources(batch)
        return seen if known is None else seen | {"source": known}

    return Objective(count, lambda batch: layout(batch).tokens, score, judge, examples)


def ranking(
    scorer: ScalarModel,
    kind: str,
    center_coef: float,
    label_smoothing: float,
    sources: Sequence[str] = (),
) -> Objective:
    """`RankedBatch`: the order of a prompt's answers, averaged over prompts."""

    def order(batch: RankedBatch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Which answers exist, which is better than which, which rows say anything."""
        exists = as_bool(batch.mask)
        pairs = better(batch.ranks, exists)
        return exists, pairs, jnp.any(pairs, axis=(1, 2))

    def count(batch: RankedBatch) -> dict[str, Array]:
        return {"preference": jnp.sum(order(batch)[2], dtype=jnp.float32)}

    def tokens(batch: RankedBatch) -> TokenBatch:
        # `[B, K, T]` → `[B · K, T]`: all answers of a prompt stay on the device of its row.
        return jax.tree.map(lambda x: jnp.reshape(x, (-1, x.shape[-1])), batch.answers)

    def score(params: Params, hidden: jax.Array, batch: RankedBatch) -> jax.Array:
        last = last_hidden(hidden, tokens(batch).segment_ids)
        return scorer.scores(params, last).reshape(batch.mask.shape)

    def source(batch: RankedBatch) -> jax.Array | None:
        return _of_rows(jax.tree.map(lambda x: x[:, 0], batch.answers))

    def judge(scores: jax.Array, batch: RankedBatch) -> Sums:
        exists, pairs, says = order(batch)
        scores = keep(scores, exists)
        if kind == "plackett_luce":
            losses = plackett_luce(scores, batch.ranks, exists)
        else:
            losses = all_pairs(scores, batch.ranks, exists, center_coef, label_smoothing)
        scores = jax.lax.stop_gradient(scores)
        gaps = scores[:, :, None] - scores[:, None, :]
        metrics = {
            "accuracy": weighted((gaps > 0).astype(jnp.float32), pairs),
            "margin": weighted(gaps, pairs),
            "best": weighted(_best_first(scores, batch.ranks, exists), says),
            "scores/mean": weighted(scores, exists),
        }
        metrics |= by_source("preference", losses, says, source(batch), sources)
        return {"preference": weighted(losses, says).total}, metrics

    def examples(scores: jax.Array, batch: RankedBatch) -> Examples:
        exists, _, says = order(batch)
        seen = {
            "scores": keep(scores, exists),
            "ranks": keep(batch.ranks, exists),
            "best": _best_first(keep(scores, exists), batch.ranks, exists),
            "mask": exists,
            "says": says,
        }
        known = source(batch)
        return seen if known is None else seen | {"source": known}

    return Objective(count, tokens, score, judge, examples)


def regression(scorer: Scorer, sources: Sequence[str] = ()) -> Objective:
    """`GradedBatch`: squared errors, averaged over the grades that were given."""

    def count(batch: GradedBatch) -> dict[str, Array]:
        return {"mse": jnp.sum(as_bool(batch.mask), dtype=jnp.float32)}

    def score(params: Params, hidden: jax.Array, batch: GradedBatch) -> jax.Array:
        last = last_hidden(hidden, batch.tokens.segment_ids)
        return scorer.outputs(params, last)[:, 0]

    def judge(scores: jax.Array, batch: GradedBatch) -> Sums:
        if batch.mask.shape[1] != len(scorer.attributes):
            raise ValueError(
                f"a batch with {batch.mask.shape[1]} grades an answer, for a reward model with the "
                f"attributes {', '.join(scorer.attributes)}; make both with the same attributes"
            )
        mask = as_bool(batch.mask)
        errors = squared_error(keep(scores, mask), keep(batch.scores, mask))
        seen, mean = jax.lax.stop_gradient((errors, scores))
        metrics = {}
        for column, name in enumerate(scorer.attributes):
            given = mask[:, column]
            metrics[f"mse/{name}"] = weighted(seen[:, column], given)
            metrics[f"scores/{name}"] = weighted(mean[:, column], given)
        known = _of_rows(batch.tokens)
        if known is not None:
            known = jnp.broadcast_to(known[:, None], mask.shape)
        metrics |= by_source("mse", errors, mask, known, sources)
        return {"mse": weighted(errors, mask).total}, metrics

    def examples(scores: jax.Array, batch: GradedBatch) -> Examples:
        mask = as_bool(batch.mask)
        seen = {"scores": keep(scores, mask), "grades": keep(batch.scores, mask), "mask": mask}
        known = _of_rows(batch.tokens)
        return seen if known is None else seen | {"source": known}

    return Objective(count, lambda batch: batch.tokens, score, judge, examples)


def steps(scorer: ScalarModel, sources: Sequence[str] = ()) -> Objective:
    """`StepBatch`: binary cross-entropy at the end of each step, averaged over steps."""

    def count(batch: StepBatch) -> dict[str, Array]:
        return {"steps": jnp.sum(as_bool(batch.mask), dtype=jnp.float32)}

    def score(params: Params, hidden: jax.Array, batch: StepBatch) -> jax.Array:
        return scorer.scores(params, hidden)

    def judge(scores: jax.Array, batch: StepBatch) -> Sums:
        mask = as_bool(batch.mask)
        scores, labels = keep(scores, mask), keep(batch.labels, mask)
        losses = step_bce(scores, labels)
        right = (jax.lax.stop_gradient(scores) > 0) == (labels >= 0.5)
        metrics = {
            "accuracy": weighted(right.astype(jnp.float32), mask),
            "probability": weighted(jax.nn.sigmoid(jax.lax.stop_gradient(scores)), mask),
        }
        metrics |= by_source("steps", losses, mask, batch.tokens.source_ids, sources)
        return {"steps": weighted(losses, mask).total}, metrics

    def examples(scores: jax.Array, batch: StepBatch) -> Examples:
        mask = as_bool(batch.mask)
        seen = {"scores": keep(scores, mask), "labels": keep(batch.labels, mask), "mask": mask}
        known = batch.tokens.source_ids
        return seen if known is None else seen | {"source": jnp.asarray(known)}

    return Objective(count, lambda batch: batch.tokens, score, judge, examples)


def _best_first(scores: jax.Array, ranks: Array, exists: jax.Array) -> jax.Array:
    """`[B]`: 1 where the answer with the highest score is one of those with the highest rank."""
    top = jnp.max(jnp.where(exists, ranks, -jnp.inf), axis=1, keepdims=True)
    pick = jnp.argmax(jnp.where(exists, scores, -jnp.inf), axis=1)[:, None]
    return (jnp.take_along_axis(jnp.asarray(ranks), pick, 1) == top)[:, 0].astype(jnp.float32)


def _of_rows(tokens: TokenBatch) -> jax.Array | None:
    """The source of rows of one sequence each: `[B]`."""
    source = source_of_sequences(tokens, tokens.segment_ids)
    return None if source is None else source[:, 0]
