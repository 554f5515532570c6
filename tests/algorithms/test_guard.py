"""The numeric guard: what is not finite, or jumps, leaves the state as it was; numbers by hand."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxalign as ja
from jaxalign.algorithms.guard import SpikeConfig, skip_spikes
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.step import make_step


class Points(NamedTuple):
    x: np.ndarray  # [B]


LOSS = ja.Loss(
    lambda batch: {"fit": jnp.float32(batch.x.size)},
    lambda params, batch: ({"fit": jnp.sum(params["w"] * batch.x)}, {}),
)


def points(*values):
    return Points(np.array(values, np.float32))


def start(tx, weight=0.5):
    return ja.init_state({"w": np.float32(weight), "other": np.float32(2)}, tx)


GOOD, NAN = points(1.0, 3.0), points(1.0, np.nan)
ADAM = make_optimizer(OptimizerConfig(learning_rate=0.1))


@pytest.mark.parametrize(
    ("tx", "batch", "weight"),
    [
        (ADAM, NAN, 0.5),  # loss and gradient
        (ADAM, GOOD, np.inf),  # loss
        (optax.sgd(np.float32(np.inf)), GOOD, 0.5),  # the update alone
        (optax.sgd(2e38), GOOD, -2e38),  # the new weight alone: −2e38 − 4e38
    ],
)
def test_what_is_not_finite_leaves_the_state_as_it_was(tx, batch, weight):
    step = jax.jit(ja.make_step(LOSS, tx))
    state = start(tx, weight)
    after, metrics = step(state, batch)
    chex.assert_trees_all_equal(after, state)
    assert metrics["bad_steps"] == 1


def test_a_good_step_goes_on_from_there_as_if_nothing_had_been():
    step = jax.jit(ja.make_step(LOSS, ADAM))
    one, metrics = step(start(ADAM), GOOD)
    two, again = step(step(start(ADAM), NAN)[0], GOOD)
    chex.assert_trees_all_equal(one, two)
    assert metrics["bad_steps"] == again["bad_steps"] == 0
    assert int(one.step) == 1
    # Adam's first update is the learning rate, against the sign of the gradient.
    np.testing.assert_allclose(one.params["w"], 0.4, rtol=1e-5)


def test_a_good_step_is_the_optimizer_s_own():
    step = jax.jit(ja.make_step(LOSS, optax.sgd(0.25)))
    state, _ = step(start(optax.sgd(0.25)), GOOD)
    assert state.params["w"] == 0.5 - 0.25 * 2.0  # the gradient is the mean of x


def test_the_program_reads_nothing_back():
    text = jax.jit(ja.make_step(LOSS, ADAM)).lower(start(ADAM), GOOD).as_text()
    assert "callback" not in text


def test_a_spike_is_left_out_and_remembered():
    tx = skip_spikes(optax.sgd(0.1), SpikeConfig(factor=4.0, window=10))
    step = jax.jit(ja.make_step(LOSS, tx))
    state, bad, limits = start(tx), [], []
    norms = [1.0, 2.0] * 5 + [7.0, 5.9, *[7.0] * 4, 27.0, 1.0]
    for norm in norms:
        before = state
        state, metrics = step(state, points(norm))
        bad.append(int(metrics["bad_steps"]))
        limits.append(float(state.opt_state.limit))
        moved = state.params["w"] != before.params["w"]
        assert moved == (not bad[-1])
    # Ten norms of median 1.5: above 6 is a spike. The window then fills with what it has seen.
    seen = [4.0 * np.median(norms[max(0, n - 9) : n + 1]) for n in range(len(norms))]
    np.testing.assert_allclose(limits[9:], seen[9:], rtol=1e-6)
    want = [0] * 10 + [int(norm > limit) for norm, limit in zip(norms[10:], seen[9:], strict=False)]
    assert bad == want
    assert sum(bad) >= 2
    assert int(state.step) == len(norms) - sum(bad)


def test_a_norm_that_is_not_finite_is_not_remembered():
    tx = skip_spikes(optax.sgd(0.1), SpikeConfig())
    state = start(tx)
    after, metrics = jax.jit(ja.make_step(LOSS, tx))(state, NAN)
    chex.assert_trees_all_equal(after, state)
    assert metrics["bad_steps"] == 1


@pytest.mark.parametrize("options", [{"factor": 1.0}, {"window": 3}])
def test_options_out_of_range(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"skip_spikes {name}="):
        SpikeConfig(**options)


def test_norms_of_policy_and_critic_apart():
    def terms(params, batch):
        value = params["policy"] * batch.x[0] + params["critic"] * batch.x[1]
        return {"fit": value}, {}

    loss = ja.Loss(lambda batch: {"fit": jnp.float32(1)}, terms)
    tx = optax.sgd(0.1)
    step = jax.jit(make_step(loss, tx, parts=("policy", "critic")))
    state = ja.init_state({"policy": np.float32(1), "critic": np.float32(1)}, tx)
    _, metrics = step(state, points(3.0, -4.0))
    norms = [metrics[f"grad_norm{part}"] for part in ("", "/policy", "/critic")]
    np.testing.assert_allclose(norms, [5.0, 3.0, 4.0], rtol=1e-6)
