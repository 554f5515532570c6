"""The sum of masked log-probabilities, whose gradient is made in the forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import target_logprobs, target_sum
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings

CAPPED = Decoder(dataclasses.replace(tiny.CONFIG, logit_softcap=2.0))


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 11, 32)).astype(np.float32))
    mask = rng.random((8, 11)) < 0.4
    mask[1] = False
    return hidden, rng.integers(0, tiny.VOCAB, (8, 11)), mask


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER)


@pytest.mark.parametrize("model", [tiny.DECODER, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("chunk", [1, 4, None])
def test_value_and_gradient_are_those_of_whole_logits(params, inputs, chunk, model):
    """With NaN where the mask is not, a factor from outside, and nothing through what is logged."""
    hidden, targets, mask = inputs
    spoiled = jnp.where(mask[..., None], hidden, jnp.nan)

    def summed(params, hidden):
        found = target_sum(model, params, hidden, targets, mask, entropy=True, chunk=chunk)
        return -0.3 * found.total + jnp.sum(found.logprobs) + jnp.sum(found.entropy), found

    def whole(params, hidden):
        logits = hidden @ params["head"]["kernel"]
        if model is CAPPED:
            logits = 2 * jnp.tanh(logits / 2)
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, -1)
        chosen, entropy = jnp.where(mask, chosen, 0.0), jnp.where(mask, entropy, 0.0)
        return -0.3 * jnp.sum(chosen), (chosen, entropy)

    got, found = jax.jit(jax.grad(summed, (0, 1), has_aux=True))(params, spoiled)
    want, (chosen, entropy) = jax.grad(whole, (0, 1), has_aux=True)(params, hidden)
    np.testing.assert_allclose(found.total, chosen.sum(), 1e-5)
    np.testing.assert_allclose(found.logprobs, chosen, 1e-5, 1e-5)
    np.testing.assert_allclose(found.entropy, entropy, 1e-4, 1e-5)
    np.testing.assert_allclose(got[0]["head"]["kernel"], want[0]["head"]["kernel"], 1e-4, 1e-5)
    np.testing.assert_allclose(got[1], want[1], 1e-4, 1e-5)
    value, plain = summed(params, spoiled)
    np.testing.assert_allclose(plain.total, found.total, 1e-6)
    assert np.isfinite(value)
    assert target_sum(model, params, hidden, targets, mask).entropy is None
    nothing = target_sum(model, params, hidden, targets, np.zeros_like(mask), chunk=chunk)
    assert (float(nothing.total), np.abs(nothing.logprobs).max()) == (0.0, 0.0)


@pytest.mark.parametrize("sizes", [(4, 2, 1), (8, 1, 1), (2, 2, 2)])
def test_rows_over_devices_change_nothing(params, inputs, sizes):
    hidden, targets, mask = inputs

    def loss(params, hidden):
        found = target_sum(tiny.DECODER, params, hidden, targets, mask, chunk=5)
        return -found.total / 7, found.logprobs

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
    want = jax.jit(run)(params, hidden)
    mesh = make_mesh(*sizes)
    placed = jax.device_put(params, param_shardings(tiny.DECODER.axes, mesh, tiny.DECODER.shapes))
    with jax.set_mesh(mesh):
        got = jax.jit(run)(placed, hidden)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, 1e-5, 1e-5)


def test_logits_are_formed_once(params, inputs):
    """Three products with the head, where log-probabilities by themselves take four."""
    hidden, targets, mask = inputs

    def products(loss, gradient):
        run = jax.grad(loss, (0, 1)) if gradient else loss
        return str(jax.make_jaxpr(run)(params, hidden)).count("dot_general")

    def summed(params, hidden):
        return target_sum(tiny.DECODER, params, hidden, targets, mask).total

    def plain(params, hidden):
        return jnp.sum(target_logprobs(tiny.DECODER, params, hidden, targets, mask=mask))

    assert [products(summed, False), products(summed, True)] == [1, 3]
    assert [products(plain, False), products(plain, True)] == [1, 4]
