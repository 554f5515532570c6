"""Losses combine: a user's own loss, sums of losses, and what a model adds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.algorithms.loss import (
    HiddenLoss,
    Loss,
    Terms,
    add_losses,
    join_losses,
    with_model_terms,
)
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import make_eval, make_step
from jaxalign.types import TokenBatch, Weighted

IDS = np.array([[1, 2, 3, 0], [4, 1, 0, 0]], np.int32)
REAL = IDS > 0
BATCH = TokenBatch(IDS, IDS, IDS, REAL.astype(np.int32), REAL)
PARAMS = {"table": np.linspace(-1, 2, 10, dtype=np.float32).reshape(5, 2)}
HIDDEN = PARAMS["table"][IDS].astype(np.float64)


class Lookup:
    """Hidden states are rows of a table; the model adds its mean square over real tokens."""

    extra_terms = ("size",)

    def apply_with_losses(self, params, inputs, positions=None, segment_ids=None):
        hidden = params["table"][inputs]
        square = jnp.sum(jnp.where(segment_ids > 0, jnp.sum(hidden**2, -1), 0.0))
        weight = jnp.sum(segment_ids > 0, dtype=jnp.float32)
        return hidden, {"size": Weighted(square, weight)}


def of_column(column, name, mask):
    """The mean of one hidden feature over the tokens of a mask."""

    def terms(params, hidden, batch):
        total = jnp.sum(jnp.where(mask(batch), hidden[..., column], 0.0))
        return Terms({name: total}, {f"{name}/seen": Weighted(total, jnp.float32(2.0))})

    return HiddenLoss(
        lambda batch: batch,
        lambda batch: {name: jnp.sum(mask(batch), dtype=jnp.float32)},
        terms,
    )


def trained(batch):
    return jnp.asarray(batch.loss_mask)


def first(batch):
    return trained(batch) & (jnp.arange(4) == 0)[None]


def test_a_model_adds_its_terms_to_any_loss():
    loss = with_model_terms(of_column(0, "mean", trained), Lookup())
    state = init_state(PARAMS, optax.sgd(0.0))
    _, metrics = jax.jit(make_step(loss, optax.sgd(0.0)))(state, BATCH)
    mean, size = HIDDEN[REAL][:, 0].mean(), np.square(HIDDEN[REAL]).sum(-1).mean()
    np.testing.assert_allclose(metrics["loss"], mean + size, rtol=1e-5)
    np.testing.assert_allclose(metrics["size"], size, rtol=1e-5)
    assert metrics["weight/size"] == metrics["weight/mean"] == 5
    parts = make_eval(loss)(state, BATCH)
    np.testing.assert_allclose(parts["loss/mean"].mean(), mean, rtol=1e-5)
    named = with_model_terms(of_column(0, "mean", trained), Lookup(), prefix="critic_")
    assert set(named.count(BATCH)) == {"mean", "critic_size"}


def test_terms_of_one_name_share_their_weight():
    """A sum of losses is averaged over all that weighs, not a sum of averages."""
    model = Lookup()
    whole = with_model_terms(of_column(0, "mean", trained), model)
    part = with_model_terms(of_column(1, "mean", first), model)
    loss = add_losses(whole, part)
    sums, metrics = jax.jit(loss.terms)(PARAMS, BATCH)
    total = HIDDEN[REAL][:, 0].sum() + HIDDEN[:, 0, 1].sum()
    np.testing.assert_allclose(sums["mean"], total, rtol=1e-5)
    assert loss.count(BATCH) == {"mean": 5 + 2, "size": 2 * 5}
    np.testing.assert_allclose(metrics["mean/seen"].mean(), total / 4, rtol=1e-5)


def test_joined_losses_read_the_model_once():
    both = join_losses(of_column(0, "left", trained), of_column(1, "right", first))
    loss = with_model_terms(both, Lookup())
    sums, _ = jax.jit(loss.terms)(PARAMS, BATCH)
    np.testing.assert_allclose(sums["right"], HIDDEN[:, 0, 1].sum(), rtol=1e-5)
    assert loss.count(BATCH) == {"left": 5, "right": 2, "size": 5}


def test_terms_without_a_weight_are_refused():
    loss = Loss(lambda batch: {"a": jnp.ones(())}, lambda params, batch: ({"b": jnp.ones(())}, {}))
    state = init_state(PARAMS, optax.sgd(0.0))
    with pytest.raises(ValueError, match="the loss has the terms b and weights for a"):
        make_step(loss, optax.sgd(0.0))(state, BATCH)


def test_metrics_do_not_train():
    """A gradient through a metric would change what is learned."""

    def terms(params, batch):
        total = jnp.sum(params["table"])
        return {"sum": total}, {"square": Weighted(total**2, jnp.ones(()))}

    loss = Loss(lambda batch: {"sum": jnp.ones(())}, terms)
    state = init_state(PARAMS, optax.sgd(1.0))
    after, metrics = jax.jit(make_step(loss, optax.sgd(1.0)))(state, BATCH)
    np.testing.assert_allclose(after.params["table"], PARAMS["table"] - 1, rtol=1e-6)
    np.testing.assert_allclose(metrics["square"], PARAMS["table"].sum() ** 2, rtol=1e-5)
