"""Log-probabilities and entropies of logits far from 0, sharp and flat, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.lm_head import target_logprobs, target_sum
from jaxalign.parallel.mesh import make_mesh

VOCAB, POSITIONS = 512, 24


class Plain:
    """Hidden states are the logits: what is tested begins after the matrix product."""

    def head(self, params):
        return params


MODEL, HEAD = Plain(), jnp.eye(VOCAB, dtype=jnp.float32)


def case(offset):
    """(logits `[1, T, V]`, targets): N(offset, 3); targets likely, unlikely, and with ties."""
    rng = np.random.default_rng(7)
    logits = rng.normal(offset, 3.0, (1, POSITIONS, VOCAB)).astype(np.float32)
    targets = rng.integers(0, VOCAB, (1, POSITIONS)).astype(np.int32)
    targets[0, ::2] = logits.argmax(-1)[0, ::2]
    logits[0, :2] = np.float32(offset)  # all alike
    logits[0, 2, :2] = logits[0, 2].max()  # the largest one twice
    return logits, targets


def exact(logits, targets, temperature, to_logprobs, to_entropy):
    """In float64: log p, entropies, and the gradient of Σ g·log p + Σ e·H to the logits."""
    z = logits.astype(np.float64) / np.float64(np.float32(temperature))
    z -= z.max(-1, keepdims=True)
    # 1 + 1e-17 has no logarithm in float64 either: the largest one is left out of the sum.
    top = np.zeros(z.shape, bool)
    np.put_along_axis(top, z.argmax(-1)[..., None], True, -1)
    logz = np.log1p(np.where(top, 0.0, np.exp(z)).sum(-1))
    logp = z - logz[..., None]
    p = np.exp(logp)
    entropy = logz - (p * z).sum(-1)
    chosen = np.take_along_axis(logp, targets[..., None], -1)[..., 0]
    onehot = np.arange(VOCAB) == targets[..., None]
    to_z = np.where(onehot, -np.expm1(chosen)[..., None], -p) * to_logprobs[..., None]
    to_z -= to_entropy[..., None] * p * (z - (p * z).sum(-1, keepdims=True))
    return chosen, entropy, to_z / np.float64(np.float32(temperature))


@functools.partial(jax.jit, static_argnames="kind")
def measured(logits, targets, temperature, to_logprobs, to_entropy, kind):
    """The same by the fused head."""

    def total(hidden):
        if kind == "none":
            logprobs = target_logprobs(MODEL, HEAD, hidden, targets, temperature, chunk=5)
            return jnp.sum(to_logprobs * logprobs), (logprobs,)
        entropy_gradient = kind == "gradient"
        logprobs, entropy = target_logprobs(
            MODEL, HEAD, hidden, targets, temperature,
            entropy=True, entropy_gradient=entropy_gradient, chunk=5,
        )  # fmt: skip
        value = jnp.sum(to_logprobs * logprobs) + jnp.sum(to_entropy * entropy)
        return value, (logprobs, entropy)

    (_, values), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return *values, gradient


def agree(got, want):
    """1e-6 relative: of each number, and of gradients of the largest entry of a position."""
    *values, gradient = got  # with or without entropies
    for have, value in zip(values, want[: len(values)], strict=True):
        np.testing.assert_allclose(have, value, rtol=1e-6, atol=1e-12)
    error = np.abs(gradient - want[2]).max(-1)
    np.testing.assert_array_less(error, 1e-6 * np.abs(want[2]).max(-1) + 1e-12)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1e4, -1e4])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0, 5.0])
def test_any_offset_and_temperature(offset, temperature):
    logits, targets = case(offset)
    rng = np.random.default_rng(1)
    to_logprobs = rng.normal(size=targets.shape).astype(np.float32)
    to_entropy = np.zeros(targets.shape, np.float32)
    for kind in ("none", "value", "gradient"):
        got = measured(logits, targets, temperature, to_logprobs, to_entropy, kind)
        agree(got, exact(logits, targets, temperature, to_logprobs, to_entropy))
        if kind == "value":
            to_entropy = rng.normal(size=targets.shape).astype(np.float32)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("offset", [100.0, 1e4])
def test_the_sum_whose_gradient_is_formed_at_once(offset, entropy):
    logits, targets = case(offset)
    mask = np.ones(targets.shape, bool)

    def total(hidden):
        result = target_sum(MODEL, HEAD, hidden, targets, mask, entropy=entropy, chunk=5)
        values = (result.logprobs, result.entropy) if entropy else (result.logprobs,)
        return result.total, values

    (value, got), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    weights = np.ones(targets.shape)
    want = exact(logits, targets, 1.0, weights, 0 * weights)
    agree((*got, gradient), want)
    np.testing.assert_allclose(value, want[0].sum(), rtol=1e-6)


@pytest.mark.parametrize("kind", ["none", "gradient"])
def test_a_vocabulary_over_devices(kind):
    """Each part has a maximum of its own; some parts hold ties with the largest of all."""
    logits, targets = case(1e4)
    mesh = make_mesh(data=1, fsdp=1, tensor=4, devices=jax.devices()[:4])
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=targets.shape).astype(np.float32) for _ in range(2)]
    if kind == "none":
        weights[1] = np.zeros_like(weights[1])
    with jax.set_mesh(mesh):
        got = jax.device_get(measured(logits, targets, 0.1, *weights, kind))
    agree(got, exact(logits, targets, 0.1, *weights))
