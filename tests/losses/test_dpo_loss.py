"""Preference losses: TRL's numbers, numpy, the value at policy = reference, extremes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.dpo import LOSS_TYPES, REFERENCE_FREE, check_options, preference_loss

# TRL 1.16 on six pairs (oracle/dpo_losses): summed log-probabilities, lengths, losses of the pairs.
PAIRS = tuple(
    np.array(x, np.float32)
    for x in (
        [-5.94584155, -15.0195415, -21.9863317, -4.42781238, -19.6807358, -14.1295044],
        [-11.761842, -10.040427, -28.786849, -18.0017138, -2.2977221, -19.2210705],
        [-10.9260387, -16.2519493, -24.8687363, -6.81474018, -16.0139141, -20.5437355],
        [-6.91704035, -8.02320957, -26.912365, -15.7900448, -2.66589785, -20.726593],
    )
)
LENGTHS = {
    "chosen_lengths": np.array([5, 9, 12, 3, 8, 6]),
    "rejected_lengths": np.array([8, 4, 11, 7, 2, 10]),
}
GOLDEN = [
    ("sigmoid", 0.1, 0.0, [0.31799838, 0.54380828, 0.48332497, 0.48942158, 0.9151119, 0.47753328]),
    ("hinge", 0.1, 0.0, [0.017500103, 0.67503738, 0.52431107, 0.54014039, 1.4034996, 0.50912881]),
    ("ipo", 0.1, 0.0, [11.548854, 18.9988, 21.062517, 15.119692, 31.837133, 16.658752]),
    ("exo_pair", 0.1, 1e-3, [1.2967457, 2.2180357, 1.9825144, 2.0066507, 3.4685922, 1.9595035]),
    (
        "exo_pair",
        0.5,
        1e-3,
        [0.0082321819, 0.69032723, 0.29649585, 0.32550415, 5.7353864, 0.27085084],
    ),
    ("nca_pair", 0.1, 0.0, [1.2012298, 1.3104386, 1.2850894, 1.2850379, 1.5123243, 1.3408465]),
    (
        "robust",
        0.5,
        0.0,
        [0.0073271748, 0.17977539, 0.088646792, 0.095609471, 2.1423562, 0.082426198],
    ),
    ("bco_pair", 0.1, 0.0, [0.95478976, 1.2307882, 1.1631851, 1.1695714, 1.6049272, 1.1942592]),
    ("sppo_hard", 0.1, 0.0, [0.02447876, 23.091736, 14.253056, 14.602942, 103.93108, 44.321838]),
    ("apo_zero", 0.1, 0.0, [0.75920093, 0.91896868, 0.88170928, 0.88554108, 1.0998604, 0.88249195]),
    ("apo_down", 0.1, 0.0, [0.89438987, 0.95023811, 0.95483595, 0.9464106, 1.0088712, 1.0347635]),
    (
        "discopop",
        0.1,
        0.0,
        [0.37437403, 0.72228587, 0.62144655, 0.63135791, 0.91529387, 0.61208558],
    ),
    (
        "sigmoid_norm",
        0.1,
        0.0,
        [0.61626834, 0.66159916, 0.67282748, 0.63911116, 0.72578502, 0.64827698],
    ),
]
REWARDS = [0.4980197, 0.12324085, 0.28824043, 0.23869276, -0.36668205, 0.64142317]  # beta = 0.1


def smoothing(loss_type):
    return 1e-3 if loss_type == "exo_pair" else 0.0


def lengths(loss_type):
    return LENGTHS if loss_type in ("ipo", "sigmoid_norm") else {}


@pytest.mark.parametrize(("loss_type", "beta", "eps", "want"), GOLDEN)
def test_golden(loss_type, beta, eps, want):
    losses, chosen, _ = preference_loss(
        *PAIRS, beta=beta, loss_type=loss_type, label_smoothing=eps, **lengths(loss_type)
    )
    # sppo_hard's first pair is a difference of nearly equal numbers in float32
    np.testing.assert_allclose(losses, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(chosen, np.array(REWARDS) * beta / 0.1, rtol=1e-5, atol=1e-6)


def test_every_type_has_a_golden_number():
    # Those that look at a whole batch are in test_trl_preference.py, the rest in test_relatives.py.
    others = {"aot", "aot_unpaired", "sft", *REFERENCE_FREE}
    assert {loss_type for loss_type, *_ in GOLDEN} == set(LOSS_TYPES) - others


PAIRWISE = [loss_type for loss_type, *_ in dict.fromkeys((g[0],) for g in GOLDEN)]


def reference(loss_type, s_c, s_r, n_c, n_r, b, e):
    """One pair in float64, written from the papers' formulas with σ and log spelled out."""

    def sig(x):
        return 1 / (1 + np.exp(-x))

    d = s_c - s_r
    return {
        "sigmoid": lambda: -(1 - e) * np.log(sig(b * d)) - e * np.log(sig(-b * d)),
        "hinge": lambda: max(0.0, 1 - b * d),
        "ipo": lambda: (s_c / n_c - s_r / n_r - 1 / (2 * b)) ** 2,
        "robust": lambda: (-(1 - e) * np.log(sig(b * d)) + e * np.log(sig(-b * d))) / (1 - 2 * e),
        "exo_pair": lambda: (
            sig(b * d) * np.log(sig(b * d) / (1 - e)) + sig(-b * d) * np.log(sig(-b * d) / e)
        ),
        "nca_pair": lambda: (
            -np.log(sig(b * s_c)) - np.log(sig(-b * s_c)) / 2 - np.log(sig(-b * s_r)) / 2
        ),
        "bco_pair": lambda: -np.log(sig(b * s_c)) - np.log(sig(-b * s_r)),
        "sppo_hard": lambda: (s_c - 0.5 / b) ** 2 + (s_r + 0.5 / b) ** 2,
        "apo_zero": lambda: 1 - sig(b * s_c) + sig(b * s_r),
        "apo_down": lambda: sig(b * s_c) + 1 - sig(b * d),
        "discopop": lambda: (
            -np.log(sig(b * d)) * (1 - sig(b * d / 0.05)) + np.exp(-b * d) * sig(b * d / 0.05)
        ),
        "sigmoid_norm": lambda: -np.log(sig(b * (s_c / n_c - s_r / n_r))),
    }[loss_type]()


@pytest.mark.parametrize("loss_type", PAIRWISE)
def test_numpy_loop_on_packed_pairs(loss_type):
    rng = np.random.default_rng(2)
    c, r, ref_c, ref_r = rng.normal(size=(4, 3, 5)) * 4 - 20
    n_c, n_r = rng.integers(1, 30, size=(2, 3, 5))
    e = 0.2 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0
    losses, chosen, rejected = preference_loss(
        c, r, ref_c, ref_r, beta=0.3, loss_type=loss_type, label_smoothing=e,
        chosen_lengths=n_c, rejected_lengths=n_r,
    )  # fmt: skip
    for i in np.ndindex(3, 5):
        want = reference(loss_type, c[i] - ref_c[i], r[i] - ref_r[i], n_c[i], n_r[i], 0.3, e)
        assert float(losses[i]) == pytest.approx(want, rel=2e-5, abs=2e-6)
    np.testing.assert_allclose(chosen, 0.3 * (c - ref_c), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rejected, 0.3 * (r - ref_r), rtol=1e-5, atol=1e-6)


LOG2 = np.log(2)
AT_REFERENCE = {  # beta = 0.1, by hand: σ(0) = 1/2
    "sigmoid": LOG2,
    "robust": LOG2,
    "sigmoid_norm": LOG2,
    "nca_pair": 2 * LOG2,
    "bco_pair": 2 * LOG2,
    "discopop": 0.5 * LOG2 + 0.5,
    "exo_pair": -LOG2 - 0.5 * np.log(0.2 * 0.8),
    "hinge": 1.0,
    "ipo": 25.0,
    "sppo_hard": 50.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    # The same at every pair: the chosen answers' 81.1897673 nats over their 43 tokens.
    "sft": 81.1897673 / 43,
}


@pytest.mark.parametrize("loss_type", AT_REFERENCE)
def test_at_policy_equal_reference(loss_type):
    eps = 0.2 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0
    losses, chosen, rejected = preference_loss(
        PAIRS[0], PAIRS[1], PAIRS[0], PAIRS[1],
        loss_type=loss_type, label_smoothing=eps, **LENGTHS,
    )  # fmt: skip
    np.testing.assert_allclose(losses, np.full(6, AT_REFERENCE[loss_type]), rtol=1e-6)
    assert not chosen.any()
    assert not rejected.any()


def test_cdpo_is_the_smoothed_mixture():
    swapped = PAIRS[1], PAIRS[0], PAIRS[3], PAIRS[2]
    straight, flipped = preference_loss(*PAIRS)[0], preference_loss(*swapped)[0]
    smoothed = preference_loss(*PAIRS, label_smoothing=0.25)[0]
    np.testing.assert_allclose(smoothed, 0.75 * straight + 0.25 * flipped, rtol=1e-6)
    assert not np.allclose(smoothed, straight)


def test_ipo_summed_is_the_published_form():
    chosen, rejected, ref_chosen, ref_rejected = (x.astype(np.float64) for x in PAIRS)
    want = ((chosen - ref_chosen) - (rejected - ref_rejected) - 5.0) ** 2
    got = preference_loss(*PAIRS, loss_type="ipo", ipo_normalize=False)[0]
    np.testing.assert_allclose(got, want, rtol=1e-4)
    assert not np.allclose(got, preference_loss(*PAIRS, loss_type="ipo", **LENGTHS)[0], rtol=0.01)


DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
EXTREMES = [(loss_type, "reverse_kl", 0.5) for loss_type in LOSS_TYPES] + [
    (loss_type, *f)
    for loss_type in DIVERGENT
    for f in (
        ("forward_kl", 0.5),
        ("js_divergence", 0.5),
        *(("alpha_divergence", alpha) for alpha in (0.5, 0.999, 2.0)),
    )
]


@pytest.mark.parametrize(("loss_type", "f_divergence", "f_alpha"), EXTREMES)
def test_finite_at_extremes(loss_type, f_divergence, f_alpha):
    chosen, rejected = jnp.meshgrid(*[jnp.array([1e4, 0.0, -1e4])] * 2)  # all nine combinations
    none, ones = jnp.zeros((3, 3)), jnp.ones((3, 3))

    def total(chosen, rejected):
        losses, *_ = preference_loss(
            chosen, rejected, none, none, loss_type=loss_type, beta=1.0,
            label_smoothing=smoothing(loss_type), chosen_lengths=ones, rejected_lengths=ones,
            f_divergence=f_divergence, f_alpha=f_alpha,
        )  # fmt: skip
        return losses.sum(), losses

    grads, losses = jax.grad(total, (0, 1), has_aux=True)(chosen, rejected)
    assert np.isfinite(losses).all()
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
def test_an_empty_slot_is_finite(loss_type):
    empty = {"chosen_lengths": jnp.zeros(1), "rejected_lengths": jnp.zeros(1)}

    def total(logp):
        return preference_loss(logp, logp, logp, logp, loss_type=loss_type, **empty)[0].sum()

    value, grad = jax.value_and_grad(total)(jnp.zeros(1))
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"loss_type": "dpo"}, "loss_type='dpo': wanted one of sigmoid, hinge, ipo"),
        ({"loss_type": ()}, "wanted one of sigmoid"),
        ({"loss_type": ("sigmoid", "sigmoid")}, "each type once"),
        ({"loss_type": ("sigmoid", "orpo")}, "each goes alone or with sft"),
        ({"loss_weights": (1.0, 2.0)}, "one number for each loss_type"),
        ({"loss_weights": (0.0,)}, "wanted numbers > 0"),
        ({"discopop_tau": 0.1}, "discopop_tau=0.1 has no effect on loss_type='sigmoid'"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau=0.0"),
        ({"simpo_gamma": 1.0}, "simpo_gamma=1.0 has no effect"),
        ({"loss_type": "simpo", "simpo_gamma": -1.0}, "simpo_gamma=-1.0: wanted"),
        ({"f_divergence": "kl"}, "f_divergence='kl': wanted one of reverse_kl"),
        ({"f_alpha": 0.3}, "f_alpha=0.3 has no effect on f_divergence='reverse_kl'"),
        ({"loss_type": "nca_pair", "f_divergence": "forward_kl"}, "of a difference"),
        ({"loss_type": "sft", "f_divergence": "forward_kl"}, "of a difference"),
        ({"loss_type": ("ipo", "aot"), "f_divergence": "js_divergence"}, "of a difference"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"label_smoothing": 0.5}, "label_smoothing=0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing=-0.1"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "no effect on loss_type='hinge'"),
        ({"loss_type": "sigmoid_norm", "label_smoothing": 0.1}, "no effect"),
        ({"loss_type": "exo_pair"}, "label_smoothing=0 with loss_type='exo_pair'"),
        ({"ipo_normalize": False}, "ipo_normalize=False has no effect on loss_type='sigmoid'"),
    ],
)
def test_options_out_of_range_or_without_effect(options, match):
    with pytest.raises(ValueError, match=match):
        check_options(**options)
    with pytest.raises(ValueError, match=match):
        preference_loss(*PAIRS, **LENGTHS, **options)


@pytest.mark.parametrize("loss_type", ["ipo", "sigmoid_norm"])
@pytest.mark.parametrize("missing", ["chosen_lengths", "rejected_lengths"])
def test_lengths_are_needed(loss_type, missing):
    with pytest.raises(ValueError, match=f"{missing} is None"):
        preference_loss(*PAIRS, loss_type=loss_type, **{**LENGTHS, missing: None})


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"ref_chosen_logps \(1,\)"):
        preference_loss(PAIRS[0], PAIRS[1], np.zeros(1), PAIRS[3])
    with pytest.raises(ValueError, match=r"chosen_lengths \(1,\)"):
        preference_loss(
            *PAIRS, loss_type="ipo", chosen_lengths=np.ones(1), rejected_lengths=np.ones(6)
        )
