"""The one train step that all algorithms share.

    step(state, batch) -> (state, metrics)

An algorithm defines a `Loss` (`algorithms.loss`): the weight of each term in a batch (`count`), and
the sums themselves (`terms`). The step divides every sum by the weight of the *whole* batch, so
that loss, gradient and metrics are the same however the batch is split into micro-batches or over
devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxalign.algorithms.guard import guarded_update
from jaxalign.algorithms.loss import Figures, Loss, Sums
from jaxalign.models.base import combine
from jaxalign.parallel.sharding import row_axes, row_shards
from jaxalign.types import Array, Params, TrainState, Weighted

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


def split_rows(batch: Any, parts: int) -> Any:
    """`[B, …]` leaves → `[parts, B / parts, …]`; row r goes to part r mod parts.

    The stride spreads every part over all devices that hold rows.

    Raises:
      ValueError: the rows do not divide into the parts, or a part's rows do not divide over the
        devices.
    """
    shards = row_shards()

    def split(x: Array) -> jax.Array:
        rows = x.shape[0]
        if rows % parts:
            raise ValueError(f"{rows} rows do not divide into micro_batches={parts}")
        if rows // parts % shards:
            raise ValueError(
                f"{rows} rows in micro_batches={parts} are {rows // parts} rows at a time, which "
                f"the mesh ({row_axes()} = {shards}) does not divide; use a multiple of "
                f"{parts * shards} rows"
            )
        return jnp.swapaxes(jnp.reshape(x, (rows // parts, parts, *x.shape[1:])), 0, 1)

    return jax.tree.map(split, batch)


def make_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    micro_batches: int = 1,
    *,
    parts: Sequence[str] = (),
) -> Step:
    """Builds a pure train step from a loss and an optimizer.

    A non-finite loss, gradient or new weight leaves the state unchanged. With an optimizer of
    `guard.skip_spikes`, so does a spike of the gradient's norm; see `algorithms.guard`.

    Args:
      loss: terms and their weights.
      tx: any optax transformation, for the parameters the state holds.
      micro_batches: how many parts the batch is split into; they run one after the other, and their
        gradients accumulate. This changes memory, not results.
      parts: keys of the parameters whose gradient norms are also logged separately.

    Returns:
      `step(state, batch) -> (state, metrics)`: pure, to be jitted with the state donated (see
      `compile_step`). Metrics are float32 scalars: the loss's own metrics; `loss`; `grad_norm`
      (global 2-norm before any clipping in `tx`) and `grad_norm/<part>`; `bad_steps`, 1 if the
      state was left unchanged, else 0; and `weight/<term>`, the tokens or pairs that counted.
    """
    if micro_batches < 1:
        raise ValueError(f"micro_batches={micro_batches}: wanted a positive integer")

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        counts = loss.count(batch)

        def objective(params: Params, part: Any) -> tuple[jax.Array, Figures]:
            sums, metrics = loss.terms(combine(params, state.frozen), part)
            _check_terms(sums, counts)
            value = sum(Weighted(total, counts[name]).mean() for name, total in sums.items())
            return jnp.asarray(value, jnp.float32), jax.lax.stop_gradient(metrics)

        gradient = jax.value_and_grad(objective, has_aux=True)
        if micro_batches == 1:
            (value, metrics), grads = gradient(state.params, batch)
        else:
            value, metrics, grads = _accumulate(
                gradient, state.params, split_rows(batch, micro_batches)
            )
        norm = optax.tree.norm(grads)
        state, bad = guarded_update(tx, state, grads, value, norm)
        logged = {name: metric.mean() for name, metric in metrics.items()}
        logged |= {f"weight/{name}": count for name, count in counts.items()}
        logged |= {"loss": value, "grad_norm": norm, "bad_steps": bad}
        logged |= {f"grad_norm/{part}": optax.tree.norm(grads[part]) for part in parts}
        return state, logged

    return step


def _check_terms(sums: Sums, counts: Sums) -> None:
    if sums.keys() != counts.keys():
        raise ValueError(
            f"the loss has the terms {', '.join(sums)} and weights for {', '.join(counts)}; wanted "
            "the same names from Loss.terms and Loss.count"
        )


def _accumulate(gradient: Any, params: Params, parts: Any) -> tuple[jax.Array, Any, Params]:
    first = jax.tree.map(lambda x: x[0], parts)
    shapes = jax.eval_shape(gradient, params, first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    ((value, metrics), grads), _ = jax.lax.scan(add, zeros, parts)
    return value, metrics, grads


def make_eval(loss: Loss) -> Callable[[TrainState, Any], Figures]:
    """Builds `evaluate(state, batch) -> {metric: Weighted}`, jitted; add results up over batches.

    Includes `loss/<term>` for each term of the loss.
    """

    @jax.jit
    def evaluate(state: TrainState, batch: Any) -> Figures:
        sums, metrics = loss.terms(combine(state.params, state.frozen), batch)
        return metrics | loss_figures(sums, loss.count(batch))

    return evaluate


def loss_figures(sums: Sums, counts: Sums) -> Figures:
    """`loss/<term>` for each term of a loss: its sum and weight."""
    _check_terms(sums, counts)
    return {f"loss/{name}": Weighted(total, counts[name]) for name, total in sums.items()}
