"""Every algorithm learns a tiny problem."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from cases import CASES

from jaxalign.algorithms import ppo
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.parallel.jax_private import count_compiled
from jaxalign.types import PromptBatch


def train(name, steps):
    """The metrics of the first and the last of `steps` updates on one batch."""
    (case,) = (case for case in CASES if case.name == name)
    state, batch, logged = case.state(), case.padded(), []
    for _ in range(steps):
        state, metrics = case.jitted()(state, batch)
        logged.append({k: float(v) for k, v in metrics.items()})
    return logged[0], logged[-1]


def test_sft_learns_a_batch_by_heart():
    first, last = train("sft", 80)
    assert first["loss"] > np.log(tiny.VOCAB)
    assert last["loss"] < 0.1


@pytest.mark.parametrize(
    ("name", "accuracy", "margin"),
    [("reward", "accuracy", "margin"), ("dpo", "rewards/accuracies", "rewards/margins")],
)
def test_preferences_are_learned(name, accuracy, margin):
    first, last = train(name, 60)
    assert first[accuracy] < 1
    assert last[accuracy] == 1
    assert last["loss"] < 0.75 * first["loss"]
    assert last[margin] > first[margin] + 1


def test_ppo_lifts_a_reward():
    """The share of token 7 in an answer, 1/64 by chance."""

    def share(tokens, prompts):
        answer = np.asarray(tokens.loss_mask)
        hits = (np.asarray(tokens.targets) == 7) & answer
        return hits.sum(1) / answer.sum(1)

    config = ppo.Config(max_new_tokens=6, kl_coef=0.001)
    # Small weights: a policy that starts close to uniform.
    policy = jax.tree.map(lambda x: 0.3 * x, tiny.random_params(tiny.DECODER, seed=1))
    critic = tiny.random_params(tiny.SCORER, seed=2)
    tx = make_optimizer(OptimizerConfig(learning_rate=2e-2, schedule="constant"))
    state = init_state(ppo.init_params(policy, critic), tx)
    prepare = ppo.make_prepare(tiny.DECODER, tiny.SCORER, share, config)
    step = jax.jit(ppo.make_step(tiny.DECODER, tiny.SCORER, tx, config), donate_argnums=0)
    tokens = np.random.default_rng(0).integers(8, tiny.VOCAB, (64, 3)).astype(np.int32)
    prompts = PromptBatch(tokens, np.ones(tokens.shape, bool), np.arange(64, dtype=np.int32))
    scores = []
    for iteration in range(16):
        key = jax.random.fold_in(jax.random.key(0), iteration)
        rollout = prepare(key, state, policy, prompts)
        scores.append(float(jnp.mean(rollout.scores)))
        for part in ppo.minibatches(key, rollout, epochs=4, count=2):
            state, _ = step(state, part)
    assert scores[0] < 0.1
    assert scores[-1] > 0.6
    assert count_compiled(step) == 1
