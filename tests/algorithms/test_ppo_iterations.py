"""PPO iteration after iteration: nothing is compiled anew; a rollout mesh changes nothing."""

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import mesh_of, param_shardings
from jaxalign.types import PromptBatch

BUCKET, ROWS = 8, 8
CONFIG = ppo.Config(max_new_tokens=6, stop_tokens=tuple(range(3, 12)), kl_in="loss", samples=2)


def prompts(seed):
    """Prompts of 1 to 8 tokens, other lengths for every seed, in a bucket of 8."""
    rng = np.random.default_rng(seed)
    mask = np.arange(BUCKET)[None] >= BUCKET - rng.integers(1, BUCKET + 1, (ROWS, 1))
    tokens = np.where(mask, rng.integers(12, tiny.VOCAB, mask.shape), 0).astype(np.int32)
    return PromptBatch(tokens, mask, np.arange(ROWS, dtype=np.int32))


def length_reward(tokens, prompts):
    return np.asarray(tokens.loss_mask).sum(1).astype(np.float32)


@pytest.fixture(scope="module")
def trained():
    mesh = make_mesh(fsdp=8)
    models = {"policy": tiny.DECODER, "critic": tiny.SCORER}
    params = {
        name: jax.device_put(tiny.random_params(m, seed=3), param_shardings(m.axes, mesh))
        for name, m in models.items()
    }
    tx = ppo.make_optimizer(optax.sgd(1e-2), optax.sgd(1e-2))
    step = ppo.make_step(tiny.DECODER, tiny.SCORER, tx, CONFIG)
    state = init_state(params, tx)
    return params["policy"], state, compile_step(step, state)


def prepare(**options):
    return ppo.make_prepare(tiny.DECODER, tiny.SCORER, length_reward, CONFIG, **options)


def test_iterations_compile_once_and_a_rollout_mesh_shows_nowhere(trained):
    policy, state, step = trained
    reference = jax.tree.map(lambda x: x.copy(), policy)
    # Written with heads split over two devices, and whole rows of them in a cache that is split
    # along time. (That `sample` gives the same answers on any mesh, test_generate.py shows.)
    rules = {"cache_heads": None, "cache_length": "tensor", "vocab": None}
    other = prepare(rollout_mesh=make_mesh(data=4, tensor=2), rollout_rules=rules)
    first = other(jax.random.key(0), state, reference, prompts(0))
    assert mesh_of(first) == mesh_of(state.params)
    assert float(ppo.rollout_metrics(first, 2)["logprobs/max_difference"]) < 1e-4

    def iterate(state, number, kl_coef, temperature):
        key = jax.random.key(number)
        rollout = other(key, state, reference, prompts(number), kl_coef, temperature=temperature)
        metrics = ppo.rollout_metrics(rollout, CONFIG.samples)
        for part in ppo.minibatches(key, rollout, epochs=2, count=2):
            state, _ = step(state, part)
        return state, float(metrics["response/length"])

    state, _ = iterate(state, 0, 0.1, 1.0)
    with jax.no_tracing():
        lengths = []
        for number, (kl_coef, temperature) in enumerate([(0.05, 0.7), (0.2, 1.3), (0.01, 1.0)], 1):
            state, length = iterate(state, number, kl_coef, temperature)
            lengths.append(length)
    assert len(set(lengths)) > 1
    assert step.compiles == 1
