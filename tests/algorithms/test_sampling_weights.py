"""Sampling with weights in fewer bits: what the sampler computes, and the logged difference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import plain_llama
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.state import init_state
from jaxalign.sampling.generate import sample
from jaxalign.sampling.weights import sampling_weights
from jaxalign.types import PromptBatch

KEY = jax.random.key(5)
ROWS, WIDTH, NEW = 4, 5, 6
RNG = np.random.default_rng(8)
PROMPTS = PromptBatch(
    RNG.integers(3, tiny.VOCAB, (ROWS, WIDTH)).astype(np.int32),
    np.ones((ROWS, WIDTH), bool),
    np.arange(ROWS, dtype=np.int32),
)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER, seed=1)


def rounded(params, kind):
    """The weights that a copy stands for, by numpy, in float32."""
    if kind == "bfloat16":
        return jax.tree.map(lambda x: np.asarray(x).astype(jnp.bfloat16).astype(np.float32), params)

    def int8(matrix, kept):
        """Of a column, 127.5 steps are its largest absolute value; a weight is off by half of one.

        Codes of weights midway between two steps depend on the last bit, so they are read.
        """
        step = np.abs(matrix).max(-2, keepdims=True) / 127.5
        np.testing.assert_allclose(kept["scales"], step, rtol=1e-6)
        near = np.asarray(kept["values"], np.float32) * np.asarray(kept["scales"])
        assert (np.abs(near - matrix) <= 0.501 * step).all()
        return near

    def walk(floats, kept):
        return {
            name: int8(np.asarray(value), kept[name])
            if name == "kernel"
            else walk(value, kept[name])
            if isinstance(value, dict)
            else np.asarray(value)
            for name, value in floats.items()
        }

    _, kept = sampling_weights(tiny.DECODER, params, kind)
    return params | {"blocks": walk(params["blocks"], kept["blocks"])}


def logprobs(params, answers):
    """Of the sampled tokens, by plain numpy, `[B, R]`."""
    out = []
    for prompt, answer in zip(PROMPTS.tokens, np.asarray(answers), strict=True):
        z = plain_llama.logits(tiny.CONFIG, params, np.concatenate([prompt, answer]))
        z = z[WIDTH - 1 : -1]
        z -= np.log(np.exp(z).sum(-1, keepdims=True))
        out.append(np.take_along_axis(z, answer[:, None], -1)[:, 0])
    return np.array(out)


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_the_sampler_computes_with_the_rounded_weights(params, kind):
    model, narrow = sampling_weights(tiny.DECODER, params, kind)
    out = sample(model, narrow, PROMPTS, KEY, max_new_tokens=NEW)
    exact, near = logprobs(params, out.tokens), logprobs(rounded(params, kind), out.tokens)
    np.testing.assert_allclose(out.logprobs, near, atol=1e-4)
    assert np.abs(exact - near).max() > 1e-3  # the test would see unrounded weights


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_a_rollout_logs_the_difference_and_trains_on_its_own(params, kind):
    config = ppo.Config(max_new_tokens=NEW, stop_tokens=(1,), sampling_weights=kind)
    critic = tiny.random_params(tiny.SCORER, seed=2)
    state = init_state(ppo.init_params(params, critic), optax.sgd(0.0))

    def reward(tokens, prompts):
        return np.asarray(tokens.loss_mask).sum(1)

    def rollout_of(config):
        prepare = ppo.make_prepare(tiny.DECODER, tiny.SCORER, reward, config)
        return prepare(KEY, state, params, PROMPTS)

    rollout = rollout_of(config)
    mask = np.asarray(rollout.tokens.loss_mask)
    answers = np.asarray(rollout.tokens.targets)[:, WIDTH - 1 :]
    exact = np.where(mask[:, WIDTH - 1 :], logprobs(params, answers), 0)
    near = np.where(mask[:, WIDTH - 1 :], logprobs(rounded(params, kind), answers), 0)
    np.testing.assert_allclose(rollout.old_logprobs[:, WIDTH - 1 :], exact, atol=1e-4)
    difference = ppo.rollout_figures(rollout)["logprobs/mean_difference"].mean()
    np.testing.assert_allclose(difference, np.abs(exact - near).sum() / mask.sum(), atol=5e-5)
    assert difference > 5e-4
    with pytest.raises(ValueError, match=r"differ by .* logprob_tolerance=1e-06"):
        rollout_of(dataclasses.replace(config, logprob_tolerance=1e-6))


def test_what_cannot_be_narrowed(params):
    with pytest.raises(ValueError, match="sampling_weights='int4'"):
        sampling_weights(tiny.DECODER, params, "int4")
    kept = dataclasses.replace(tiny.DECODER, quantize="nf4")
    with pytest.raises(ValueError, match="kept as nf4"):
        sampling_weights(kept, params, "int8")
