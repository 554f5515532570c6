"""DPO's relatives against numpy in float64: transport, divergences, weights, no reference, KTO."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import kto, reference_free
from jaxalign.losses.divergence import F_DIVERGENCES, divergence_score
from jaxalign.losses.dpo import preference_loss
from jaxalign.losses.tokens import length_desensitised, wpo_weight

RNG = np.random.default_rng(5)
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = RNG.normal(size=(4, 3, 4)) * 5 - 25
N_CHOSEN, N_REJECTED = RNG.integers(2, 30, size=(2, 3, 4))
LENGTHS = {"chosen_lengths": N_CHOSEN, "rejected_lengths": N_REJECTED}
ALL = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)


def sig(x):
    return 1 / (1 + np.exp(-x))


# Optimal transport


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("eps", [0.0, 0.2])
def test_transport_sorts_all_pairs_that_exist(loss_type, eps):
    if loss_type == "aot":
        upper, lower = (CHOSEN - REJECTED)[MASK], (REF_CHOSEN - REF_REJECTED)[MASK]
    else:
        upper, lower = (CHOSEN - REF_CHOSEN)[MASK], (REJECTED - REF_REJECTED)[MASK]
    gap = 0.3 * (np.sort(upper) - np.sort(lower))
    want = -(1 - eps) * np.log(sig(gap)) - eps * np.log(sig(-gap))
    garbage = [np.where(MASK, x, 1e6) for x in ALL]
    got = preference_loss(*garbage, beta=0.3, loss_type=loss_type, label_smoothing=eps, mask=MASK)[
        0
    ]
    # Each loss stands at the pair that its upper value belongs to.
    np.testing.assert_allclose(np.asarray(got)[MASK][np.argsort(upper)], want, rtol=1e-5)
    assert not np.asarray(got)[~MASK].any()


def test_transport_moves_the_paired_values():
    """The gradient goes to the pairs that hold the compared values, against finite differences."""

    def total(x):
        return preference_loss(x, *ALL[1:], loss_type="aot_unpaired", mask=MASK)[0].sum()

    grad = np.asarray(jax.grad(total)(jnp.asarray(CHOSEN, jnp.float32)))
    gap = np.sort((CHOSEN - REF_CHOSEN)[MASK]) - np.sort((REJECTED - REF_REJECTED)[MASK])
    want = np.zeros(gap.size)
    want[np.argsort((CHOSEN - REF_CHOSEN)[MASK])] = -0.1 * sig(-0.1 * gap)
    np.testing.assert_allclose(grad[MASK], want, rtol=1e-4)
    assert not grad[~MASK].any()


# Divergences


@pytest.mark.parametrize("f_divergence", F_DIVERGENCES)
def test_divergences_are_derivatives_of_f(f_divergence):
    """f′(t) with f written from the divergences' definitions, by finite differences."""
    alpha = 0.3
    f = {
        "reverse_kl": lambda t: t * np.log(t) - t + 1,
        "forward_kl": lambda t: -np.log(t) + t - 1,
        "js_divergence": lambda t: t * np.log(t) - (t + 1) * np.log((t + 1) / 2),
        "alpha_divergence": lambda t: (t**alpha - alpha * t - (1 - alpha)) / (alpha * (alpha - 1)),
    }[f_divergence]
    ratio = np.linspace(-3, 3, 13)
    t, h = np.exp(ratio), 1e-6
    want = (f(t + h) - f(t - h)) / (2 * h)
    options = {"f_alpha": alpha} if f_divergence == "alpha_divergence" else {}
    got = divergence_score(ratio, f_divergence, **options)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_alpha_has_the_two_kls_as_its_limits():
    ratio = np.linspace(-3, 3, 7)
    one = divergence_score(ratio, "alpha_divergence", 1.0)
    np.testing.assert_array_equal(one, np.float32(ratio))
    zero = divergence_score(ratio, "alpha_divergence", 0.0)
    np.testing.assert_array_equal(zero, divergence_score(ratio, "forward_kl"))


def test_far_scores_go_on_along_the_tangent():
    def score(x):
        return divergence_score(x, "forward_kl")

    near, far = jnp.float32(-30.0), jnp.float32(-1e4)
    assert score(far) < score(near)
    np.testing.assert_allclose(jax.grad(score)(far), np.exp(30.0), rtol=1e-5)
    np.testing.assert_allclose(score(jnp.float32(-32.0)), 1 - 3 * np.exp(30.0), rtol=1e-5)


def test_an_infinite_alpha_is_refused():
    with pytest.raises(ValueError, match="f_alpha=inf"):
        divergence_score(np.zeros(1), "alpha_divergence", float("inf"))


# Combinations, shift, weights


def test_a_combination_is_the_weighted_sum():
    types, weights = ("sigmoid", "ipo", "sft"), (0.5, 2.0, 0.25)
    got, *_ = preference_loss(*ALL, loss_type=types, loss_weights=weights, **LENGTHS)
    each = [preference_loss(*ALL, loss_type=name, **LENGTHS)[0] for name in types]
    np.testing.assert_allclose(got, sum(map(np.multiply, weights, each)), rtol=1e-6)


def test_sft_is_the_mean_over_tokens_of_existing_pairs():
    got, *_ = preference_loss(*ALL, loss_type="sft", mask=MASK, **LENGTHS)
    want = -CHOSEN[MASK].sum() / N_CHOSEN[MASK].sum()
    np.testing.assert_allclose(got, np.full((3, 4), want), rtol=1e-6)
    other, *_ = preference_loss(*ALL, loss_type="sft", chosen_sft_logps=2 * CHOSEN, **LENGTHS)
    np.testing.assert_allclose(other, -2 * CHOSEN.sum() / N_CHOSEN.sum(), rtol=1e-6)


def test_bco_with_a_shift():
    s_c, s_r = 0.1 * (CHOSEN - REF_CHOSEN), 0.1 * (REJECTED - REF_REJECTED)
    want = -np.log(sig(s_c - 0.7)) - np.log(sig(-(s_r - 0.7)))
    got, rewards, _ = preference_loss(*ALL, loss_type="bco_pair", reward_shift=0.7)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(rewards, s_c, rtol=1e-5, atol=1e-6)


def test_discopop_with_another_temperature():
    x = 0.1 * ((CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED))
    m = sig(x / 0.5)
    got = preference_loss(*ALL, loss_type="discopop", discopop_tau=0.5)[0]
    np.testing.assert_allclose(got, (1 - m) * -np.log(sig(x)) + m * np.exp(-x), rtol=1e-5)


def test_pair_weights_multiply_and_aot_refuses_them():
    weights = RNG.uniform(0.1, 2, size=(3, 4))
    got, *_ = preference_loss(*ALL, pair_weights=weights)
    np.testing.assert_allclose(got, weights * preference_loss(*ALL)[0], rtol=1e-5)
    with pytest.raises(ValueError, match="pair_weights with loss_type='aot'"):
        preference_loss(*ALL, loss_type="aot", pair_weights=weights)


def test_wpo_weight_has_no_gradient():
    def total(x):
        return wpo_weight(x, x * 0.5, N_CHOSEN).sum()

    np.testing.assert_allclose(
        wpo_weight(CHOSEN, REJECTED, N_CHOSEN), np.exp((CHOSEN - REJECTED) / N_CHOSEN), rtol=1e-5
    )
    assert not np.asarray(jax.grad(total)(jnp.asarray(CHOSEN, jnp.float32))).any()


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_length_desensitised(ld_alpha):
    logprobs = -RNG.random(7)
    got = length_desensitised(logprobs, np.arange(1, 8), np.full(7, 4), ld_alpha)
    np.testing.assert_allclose(got, logprobs * np.r_[[1] * 4, [ld_alpha] * 3], rtol=1e-6)


@pytest.mark.parametrize("ld_alpha", [-0.1, 1.1, float("nan")])
def test_ld_alpha_out_of_range(ld_alpha):
    with pytest.raises(ValueError, match="ld_alpha="):
        length_desensitised(np.zeros(1), np.ones(1), np.ones(1), ld_alpha)


# Without a reference


def test_simpo():
    r_c, r_r = 2.0 * CHOSEN / N_CHOSEN, 2.0 * REJECTED / N_REJECTED
    gap = r_c - r_r - 0.8
    want = -0.9 * np.log(sig(gap)) - 0.1 * np.log(sig(-gap))
    options = {"beta": 2.0, "simpo_gamma": 0.8, "label_smoothing": 0.1}
    direct = reference_free.simpo(CHOSEN, REJECTED, **LENGTHS, **options)
    through = preference_loss(CHOSEN, REJECTED, loss_type="simpo", **LENGTHS, **options)
    for got in (direct, through):
        np.testing.assert_allclose(got[0], want, rtol=1e-5)
        np.testing.assert_allclose(got[1], r_c, rtol=1e-5)
        np.testing.assert_allclose(got[2], r_r, rtol=1e-5)


def test_orpo():
    def log_odds(logp):
        p = np.exp(logp)
        return np.log(p / (1 - p))

    mean_c, mean_r = CHOSEN / N_CHOSEN, REJECTED / N_REJECTED
    want = -0.3 * np.log(sig(log_odds(mean_c) - log_odds(mean_r)))
    got = preference_loss(CHOSEN, REJECTED, loss_type="orpo", beta=0.3, **LENGTHS)
    np.testing.assert_allclose(got[0], want, rtol=1e-5)
    np.testing.assert_allclose(got[1], 0.3 * mean_c, rtol=1e-5)


def test_orpo_of_a_sure_answer_is_finite():
    def total(x):
        return reference_free.orpo(
            x, x - 1, chosen_lengths=jnp.ones(2), rejected_lengths=jnp.ones(2)
        )[0].sum()

    value, grad = jax.value_and_grad(total)(jnp.array([0.0, -1e-9]))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_cpo_is_dpo_with_a_flat_reference():
    got = preference_loss(CHOSEN, REJECTED, loss_type="cpo", label_smoothing=0.1)
    none = np.zeros_like(CHOSEN)
    want = preference_loss(CHOSEN, REJECTED, none, none, label_smoothing=0.1)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_missing_reference_is_refused():
    with pytest.raises(ValueError, match="compares with a reference"):
        preference_loss(CHOSEN, REJECTED)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_lengths_are_needed_without_a_reference(loss_type):
    with pytest.raises(ValueError, match="rejected_lengths is None"):
        preference_loss(CHOSEN, REJECTED, loss_type=loss_type, chosen_lengths=N_CHOSEN)


# KTO


def test_kto():
    s, z = CHOSEN - REF_CHOSEN, 0.6
    good = MASK
    want = np.where(good, 1.5 * (1 - sig(0.2 * (s - z))), 0.5 * (1 - sig(0.2 * (z - s))))
    got, rewards = kto.kto_loss(
        CHOSEN, REF_CHOSEN, good, np.full((3, 4), z),
        beta=0.2, desirable_weight=1.5, undesirable_weight=0.5,
    )  # fmt: skip
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(rewards, 0.2 * s, rtol=1e-5, atol=1e-6)


def test_the_kl_estimate_is_clamped_and_has_no_gradient():
    both = jnp.array([2.0, 4.0]), jnp.array([1.0, 1.0])
    every = jnp.array([True, True])
    assert kto.kl_estimate(*both, every) == 2.0
    assert kto.kl_estimate(*both, jnp.array([True, False])) == 1.0
    assert kto.kl_estimate(*both[::-1], every) == 0.0
    assert not np.asarray(jax.grad(lambda x: kto.kl_estimate(x, both[1], every))(both[0])).any()

    def through_kl(z):
        return kto.kto_loss(both[0], both[1], every, z)[0].sum()

    assert not np.asarray(jax.grad(through_kl)(jnp.ones(2))).any()


def test_kto_is_finite_at_extremes():
    s = jnp.array([1e4, -1e4, 1e4, -1e4])
    good = jnp.array([True, True, False, False])

    def total(x):
        return kto.kto_loss(x, jnp.zeros(4), good, jnp.ones(4), beta=1.0)[0].sum()

    value, grad = jax.value_and_grad(total)(s)
    assert value == pytest.approx(2.0)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_kto_options_out_of_range(name):
    with pytest.raises(ValueError, match=f"{name}=0.0"):
        kto.kto_loss(CHOSEN, REF_CHOSEN, MASK, np.zeros((3, 4)), **{name: 0.0})
