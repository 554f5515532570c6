"""What holds for every public loss: it compiles, and computes in float32 whatever comes in."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import (
    divergence,
    dpo,
    graded,
    kto,
    ppo,
    process,
    ranking,
    reference_free,
    reward,
    sft,
    tokens,
)

MODULES = (sft, reward, ranking, graded, process, dpo, divergence, tokens, reference_free, kto, ppo)

B, T = 4, 6
RNG = np.random.default_rng(7)


def per_token(count):
    return [RNG.normal(size=(B, T)) for _ in range(count)]


def per_row(count):
    return [RNG.normal(size=B) for _ in range(count)]


MASK = RNG.random((B, T)) > 0.3
LENGTHS = {"chosen_lengths": np.arange(1, B + 1), "rejected_lengths": np.arange(2, B + 2)}

CASES = {
    "nll": (sft.nll, per_token(1)),
    "dft": (sft.dft, per_token(1)),
    "bradley_terry": (
        partial(reward.bradley_terry, center_coef=0.1, label_smoothing=0.1),
        per_row(3),
    ),
    "plackett_luce": (lambda r, y: ranking.plackett_luce(r, y, MASK), per_token(2)),
    "all_pairs": (
        lambda r, y: ranking.all_pairs(r, y, MASK, center_coef=0.1, label_smoothing=0.1),
        per_token(2),
    ),
    "squared_error": (graded.squared_error, per_token(2)),
    "step_bce": (process.step_bce, per_token(2)),
    "solution_score": (lambda r: process.solution_score(r, MASK, "min"), per_token(1)),
    "kl": (partial(ppo.kl, estimator="k3"), per_token(2)),
    "policy_loss": (partial(ppo.policy_loss, dual_clip=2.0), per_token(3)),
    "value_loss": (ppo.value_loss, per_token(3)),
    "gae": (lambda r, v: ppo.gae(r, v, MASK), per_token(2)),
    "token_rewards": (
        lambda kl, s: ppo.token_rewards(kl, s, MASK, kl_coef=0.1, score_at="after_eos")[0],
        per_token(1) + per_row(1),
    ),
    "missing_eos_penalty": (
        lambda s: ppo.missing_eos_penalty(s, MASK[:, 0], 1.0),
        per_row(1),
    ),
    "adaptive_kl_coef": (
        partial(ppo.adaptive_kl_coef, target=6.0, horizon=100.0, batch_size=8),
        [np.array(0.1), np.array(6.5)],
    ),
    "divergence_score": (
        partial(divergence.divergence_score, f_divergence="alpha_divergence", f_alpha=0.3),
        per_token(1),
    ),
    "length_desensitised": (
        lambda x: tokens.length_desensitised(x, np.arange(6), np.full(6, 3), 0.5),
        [RNG.normal(size=T)],
    ),
    "wpo_weight": (lambda x, y: tokens.wpo_weight(x, y, np.arange(B)), per_row(2)),
    "kto_loss": (lambda x, y: kto.kto_loss(x, y, MASK[:, 0], np.ones(B)), per_row(2)),
    "kl_estimate": (lambda x, y: kto.kl_estimate(x, y, MASK[:, 0]), per_row(2)),
    "simpo": (partial(reference_free.simpo, **LENGTHS), per_row(2)),
    "orpo": (lambda x, y: reference_free.orpo(-abs(x), -abs(y), **LENGTHS), per_row(2)),
    "cpo": (reference_free.cpo, per_row(2)),
} | {
    loss_type: (
        partial(
            dpo.preference_loss,
            loss_type=loss_type,
            label_smoothing=0.1 if loss_type == "exo_pair" else 0.0,
            **LENGTHS,
        ),
        per_row(4),
    )
    for loss_type in dpo.LOSS_TYPES
}


@pytest.mark.parametrize("name", CASES)
def test_compiles_and_computes_in_float32(name):
    function, inputs = CASES[name]
    inputs = [jnp.asarray(x, jnp.bfloat16) for x in inputs]
    exact = [x.astype(jnp.float32) for x in inputs]  # the same numbers
    compiled = jax.tree.leaves(jax.jit(function)(*inputs))
    for got, want in zip(compiled, jax.tree.leaves(function(*exact)), strict=True):
        assert got.dtype == jnp.float32
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_every_public_loss_is_covered():
    public = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if callable(value)
        and getattr(value, "__module__", "") == module.__name__
        and not name.startswith(("_", "check_", "as_", "needs_"))
    }
    # `better` compares ranks: no floats come out of it.
    assert public - {"preference_loss", "better"} <= set(CASES)
    assert "preference_loss" in public
