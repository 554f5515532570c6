"""SFT and Bradley–Terry: hand values, numpy, extremes, and TRL's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses.masked import keep, weighted
from jaxalign.losses.reward import bradley_terry
from jaxalign.losses.sft import dft, nll

# TRL 1.16: scores of six pairs and the mean loss in four configurations (oracle/reward_losses).
CHOSEN = [0.70376045, -1.1366181, -0.77713394, -0.5711907, -0.90253544, 1.8313916]
REJECTED = [-1.5248253, 2.1113837, -0.23083636, 1.154367, 0.93018097, 0.5953668]
MARGIN = [0.3029462, 1.2765667, 1.734541, 1.7504525, 0.5056298, 1.7123618]


def test_nll_by_hand():
    got = nll(jnp.log(jnp.array([[0.5, 0.25, 1.0]])))
    np.testing.assert_allclose(got, [[np.log(2), np.log(4), 0]], rtol=1e-6)


def test_dft_by_hand():
    """−p log p, whose gradient is −p: the weight is a constant."""
    logprobs = jnp.log(jnp.array([0.5, 0.25, 1.0]))
    np.testing.assert_allclose(dft(logprobs), [0.5 * np.log(2), 0.25 * np.log(4), 0], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: dft(x).sum())(logprobs), [-0.5, -0.25, -1])


def test_nll_padding_is_invisible():
    row = np.log([[0.5, 0.25]]).astype(np.float32)
    padded = np.concatenate([row, np.full((1, 3), np.nan, np.float32)], axis=1)
    mask = np.array([[True, True, False, False, False]])

    def loss(logprobs, mask):
        return weighted(nll(keep(logprobs, mask)), mask).mean()

    short, short_grad = jax.value_and_grad(loss)(jnp.asarray(row), np.ones((1, 2), bool))
    long, long_grad = jax.value_and_grad(loss)(jnp.asarray(padded), mask)
    assert float(short) == float(long) == pytest.approx(1.5 * np.log(2))
    np.testing.assert_allclose(short_grad, [[-0.5, -0.5]])
    np.testing.assert_allclose(long_grad, [[-0.5, -0.5, 0, 0, 0]])


def test_bradley_terry_by_hand():
    # σ(ln 3) = 3/4
    got = bradley_terry(jnp.log(jnp.array([3.0, 6.0])), jnp.log(jnp.array([1.0, 2.0])))
    np.testing.assert_allclose(got, [-np.log(0.75)] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("with_margin", "center_coef", "mean"),
    [
        (False, 0.0, 1.4195246),
        (True, 0.0, 2.324321),
        (False, 0.01, 1.4343084),
        (True, 0.1, 2.4721599),
    ],
)
def test_bradley_terry_golden(with_margin, center_coef, mean):
    margin = np.array(MARGIN) if with_margin else None
    got = bradley_terry(np.array(CHOSEN), np.array(REJECTED), margin, center_coef)
    assert got.shape == (6,)
    assert float(got.mean()) == pytest.approx(mean, rel=1e-5)


def test_bradley_terry_in_numpy_for_packed_rows():
    rng = np.random.default_rng(1)
    chosen, rejected, margin = rng.normal(size=(3, 4, 5))
    want = np.zeros((4, 5))
    for i in np.ndindex(4, 5):
        gap = chosen[i] - rejected[i] - margin[i]
        want[i] = np.log(1 + np.exp(-gap)) + 0.3 * (chosen[i] + rejected[i]) ** 2
    np.testing.assert_allclose(bradley_terry(chosen, rejected, margin, 0.3), want, rtol=1e-5)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_bradley_terry_at_extremes(gap):
    value, grad = jax.value_and_grad(lambda r: bradley_terry(r, jnp.zeros(1))[0])(jnp.array([gap]))
    assert float(value) == pytest.approx(max(-gap, 0))
    np.testing.assert_allclose(grad, [-1.0 if gap < 0 else 0.0])


def test_bradley_terry_with_label_smoothing_by_hand():
    # σ(ln 3) = ¾: −0.9 · log ¾ − 0.1 · log ¼; with margin ln 3 both sides are even.
    chosen = jnp.log(jnp.array([3.0, 3.0]))
    margin = np.log([1.0, 3.0])
    got = bradley_terry(chosen, jnp.zeros(2), margin, label_smoothing=0.1)
    want = [0.9 * np.log(4 / 3) + 0.1 * np.log(4), np.log(2)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_bradley_terry_with_label_smoothing_is_least_at_its_log_odds():
    best = jnp.array([np.log(0.8 / 0.2), -1e4, 1e4])
    grad = jax.grad(lambda r: bradley_terry(r, jnp.zeros(3), label_smoothing=0.2).sum())(best)
    np.testing.assert_allclose(grad, [0, -0.8, 0.2], atol=1e-7)


def test_bradley_terry_errors():
    with pytest.raises(ValueError, match=r"rejected_scores \(1,\)"):
        bradley_terry(np.zeros(2), np.zeros(1))
    with pytest.raises(ValueError, match=r"margin \(1,\)"):
        bradley_terry(np.zeros(2), np.zeros(2), np.zeros(1))
    with pytest.raises(ValueError, match="center_coef=-1"):
        bradley_terry(np.zeros(2), np.zeros(2), center_coef=-1)
    for epsilon in (0.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match="label_smoothing="):
            bradley_terry(np.zeros(2), np.zeros(2), label_smoothing=epsilon)


@pytest.mark.parametrize("case", ["plain", "margin", "center", "margin_center"])
def test_bradley_terry_trl(shared, case):
    z = np.load(shared / "oracle" / "reward_losses.npz")
    margin = z["margin"] if "margin" in case else None
    center = float(z[f"{case}/center_coefficient"]) if "center" in case else 0.0
    value, grad = jax.value_and_grad(
        lambda r: bradley_terry(r[:6], r[6:], margin, center_coef=center).mean()
    )(jnp.asarray(z["rewards"]))
    np.testing.assert_allclose(value, z[f"{case}/loss"], rtol=1e-5)
    np.testing.assert_allclose(grad, z[f"{case}/grad"], rtol=1e-5, atol=1e-7)
