"""Losses as values that combine, like optax's transformations.

    sft = HiddenLoss(tokens, count, terms)                    # the mathematics of one algorithm
    loss = with_model_terms(by_source(sft, names), model)     # a Loss, for make_step and make_eval

The mathematics of a loss starts from the hidden states of its rows. `with_model_terms` runs the
model over those rows once, and adds the model's own terms, such as the router balance of a mixture
of experts. `by_source` (in its own file) adds metrics for each data source. `join_losses` puts
several losses on the same hidden states; `add_losses` adds whole losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.models.base import LanguageModel, ScalarModel, read, read_counts
from jaxalign.models.ops import take_columns
from jaxalign.types import Array, Params, TokenBatch, Weighted

Sums = dict[str, Array]
"""Term → the sum of its losses over a batch, before division."""

Figures = dict[str, Weighted]
"""Metric → its sum and weight."""


class Loss(NamedTuple):
    """A sum of terms, each an average over its own weight:

        L = Σ_term sum / weight

    Attributes:
      count: batch → `{term: weight}`, float32 scalars. It gets the whole batch and reads only masks
        and weights.
      terms: (parameters, batch) → (`{term: sum}`, `{metric: Weighted}`), float32 scalars. It gets
        one micro-batch at a time; the step adds the parts before it divides.
    """

    count: Callable[[Any], Sums]
    terms: Callable[[Params, Any], tuple[Sums, Figures]]


class Entries(NamedTuple):
    """The losses of a term before they are summed; `by_source` splits them.

    Attributes:
      name: the term's name, such as "nll".
      losses: one loss per token, answer or pair; any shape.
      mask: the same shape; which losses count.
      source_ids: int, the same shape, from 0: the data source. None: not recorded.
      weights: float32, the same shape, the weight of each loss. None: 1 each.
    """

    name: str
    losses: Array
    mask: Array
    source_ids: Array | None
    weights: Array | None = None


class Terms(NamedTuple):
    """What a `HiddenLoss` computes from a batch.

    Attributes:
      sums: `{term: sum}`.
      metrics: `{metric: Weighted}`; no gradient flows through them.
      entries: the main term before the sum; None: no metrics by source.
      outputs: the head's outputs, such as scores, for evaluations of single examples.
    """

    sums: Sums
    metrics: Figures
    entries: Entries | None = None
    outputs: Any = None


class HiddenLoss(NamedTuple):
    """A loss as a function of a model's hidden states.

    Attributes:
      tokens: batch → the rows to run the model on, `[R, T]`.
      count: as in `Loss`.
      terms: (parameters, hidden states `[R, T, D]`, batch) → `Terms`.
      token_weights: whether the loss uses `TokenBatch.weights`; if not, rows with weights are an
        error.
      columns: batch → int32 `[R, Q]`, the columns whose hidden states `terms` gets, then `[R, Q,
        D]`. The model may save work elsewhere. None, here or as a result: all columns.
    """

    tokens: Callable[[Any], TokenBatch]
    count: Callable[[Any], Sums]
    terms: Callable[[Params, jax.Array, Any], Terms]
    token_weights: bool = False
    columns: Callable[[Any], Array | None] | None = None

    def columns_of(self, batch: Any) -> Array | None:
        """The columns of a batch that `terms` reads; None: all."""
        return None if self.columns is None else self.columns(batch)


def run_model(
    loss: HiddenLoss,
    model: LanguageModel | ScalarModel,
    *,
    part: str | None = None,
    prefix: str = "",
) -> Callable[[Params, Any], Terms]:
    """(parameters, batch) → `Terms`: one forward pass, the loss on it, and the model's own terms.

    The arguments are those of `with_model_terms`.
    """

    def run(params: Params, batch: Any) -> Terms:
        own = params if part is None else params[part]
        tokens = loss.tokens(batch)
        if tokens.weights is not None and not loss.token_weights:
            raise ValueError(
                "TokenBatch.weights: this loss has no weights of tokens, wanted None; SFT has, and "
                "pairs have PairBatch.weights"
            )
        hidden, extra = read(model, own, tokens, loss.columns_of(batch))
        terms = loss.terms(params, hidden, batch)
        added = {f"{prefix}{name}": term for name, term in extra.items()}
        sums = {name: term.total for name, term in added.items()}
        return terms._replace(sums=terms.sums | sums, metrics=terms.metrics | added)

    return run


def with_model_terms(
    loss: HiddenLoss,
    model: LanguageModel | ScalarModel,
    *,
    part: str | None = None,
    prefix: str = "",
) -> Loss:
    """Turns a `HiddenLoss` into a `Loss` of a model's parameters, and adds the model's own terms.

    A model names its terms in `extra_terms` (see `models.base.read`). Each is averaged over all
    tokens except padding, and logged under its name.

    Args:
      loss: the mathematics.
      model: a `LanguageModel` or `ScalarModel`.
      part: the model's parameters are `params[part]`; None: all of `params`. The loss always gets
        all.
      prefix: put before the names of the model's terms.
    """
    run = run_model(loss, model, part=part, prefix=prefix)

    def count(batch: Any) -> Sums:
        extra = read_counts(model, loss.tokens(batch))
        return loss.count(batch) | {f"{prefix}{name}": x for name, x in extra.items()}

    def terms(params: Params, batch: Any) -> tuple[Sums, Figures]:
        result = run(params, batch)
        return result.sums, result.metrics

    return Loss(count, terms)


def join_losses(*losses: HiddenLoss) -> HiddenLoss:
    """Joins several losses on the hidden states of the same rows, which the first loss selects.

    All columns are read unless all losses read those of one function.
    """
    together = all(loss.columns is losses[0].columns for loss in losses)

    def count(batch: Any) -> Sums:
        return _added(loss.count(batch) for loss in losses)

    def part_of(loss: HiddenLoss, hidden: jax.Array, batch: Any) -> jax.Array:
        columns = None if together else loss.columns_of(batch)
        return hidden if columns is None else take_columns(hidden, columns)

    def terms(params: Params, hidden: jax.Array, batch: Any) -> Terms:
        parts = [loss.terms(params, part_of(loss, hidden, batch), batch) for loss in losses]
        return parts[0]._replace(
            sums=_added(part.sums for part in parts),
            metrics=_added(part.metrics for part in parts),
        )

    columns = losses[0].columns if together else None
    return HiddenLoss(losses[0].tokens, count, terms, columns=columns)


def add_losses(*losses: Loss) -> Loss:
    """The sum of several losses; terms of the same name are averaged over their combined weight."""

    def count(batch: Any) -> Sums:
        return _added(loss.count(batch) for loss in losses)

    def terms(params: Params, batch: Any) -> tuple[Sums, Figures]:
        parts = [loss.terms(params, batch) for loss in losses]
        return _added(sums for sums, _ in parts), _added(metrics for _, metrics in parts)

    return Loss(count, terms)


def _added(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Merges dicts; entries of the same name are added up."""
    result: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            known = name in result
            result[name] = jax.tree.map(jnp.add, result[name], value) if known else value
    return result
