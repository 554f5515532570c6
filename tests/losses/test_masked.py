"""Masked sums, means, variances and segments against numpy, and against TRL's helpers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import masked
from jaxalign.losses.masked import whiten
from jaxalign.losses.summation import exact_sum
from jaxalign.types import Weighted

KEPT = [2.0, -1.0, 4.0, 0.5]
X = np.array([[2.0, -1.0, np.nan], [np.inf, 4.0, 0.5]], np.float32)
MASK = np.array([[True, True, False], [False, True, True]])


def test_a_weight_that_is_no_number_is_not_hidden():
    assert np.isnan(Weighted(jnp.float32(1.0), jnp.float32(np.nan)).mean())
    assert Weighted(jnp.float32(1.0), jnp.float32(0.0)).mean() == 0.0


def test_the_order_of_an_exact_sum_does_not_show():
    """Its value is that of float64, and the gradient that of a sum."""
    x = np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32)
    x[0, 0] -= x.astype(np.float64).sum()  # what is left of numbers around 1 is about 1e-6
    orders = [x, x[::-1], x.T, x.reshape(-1)[np.argsort(x, axis=None)]]
    sums = {float(exact_sum(jnp.asarray(order))) for order in orders}
    (one,) = sums
    assert one == pytest.approx(x.astype(np.float64).sum(), rel=1e-6)
    assert len({float(jnp.sum(jnp.asarray(order))) for order in orders}) > 1
    np.testing.assert_array_equal(jax.grad(exact_sum)(x), np.ones(x.shape, np.float32))
    assert exact_sum(jnp.zeros((0, 3))) == 0.0
    assert np.isnan(exact_sum(jnp.array([1.0, np.nan])))


def test_whitening_leaves_no_mean():
    rng = np.random.default_rng(0)
    x = rng.normal(30.0, 0.5, (50, 40)).astype(np.float32)
    mask = rng.random((50, 40)) < 0.6
    white = np.asarray(whiten(x, mask), np.float64)[mask]
    assert abs(white.mean()) < 1e-8
    np.testing.assert_allclose(white.std(), 1.0, rtol=1e-5)


def test_weighted_is_a_sum_and_a_count():
    part = masked.weighted(X, MASK)
    assert isinstance(part, Weighted)
    assert (float(part.total), float(part.weight)) == (5.5, 4.0)


def test_weighted_parts_add_up_to_the_whole():
    parts = [masked.weighted(X[i], MASK[i]) for i in range(2)]
    whole = Weighted(*(sum(leaf) for leaf in zip(*parts, strict=True)))
    assert float(whole.mean()) == pytest.approx(np.mean(KEPT))


def test_sum_mean_var():
    assert float(masked.masked_sum(X, MASK)) == pytest.approx(5.5)
    assert float(masked.masked_mean(X, MASK)) == pytest.approx(np.mean(KEPT))
    assert float(masked.masked_var(X, MASK)) == pytest.approx(np.var(KEPT))
    assert float(masked.masked_var(X, MASK, ddof=1)) == pytest.approx(np.var(KEPT, ddof=1))


def test_axis():
    np.testing.assert_allclose(masked.masked_sum(X, MASK, axis=1), [1.0, 4.5])
    np.testing.assert_allclose(masked.masked_mean(X, MASK, axis=-1), [0.5, 2.25])
    np.testing.assert_allclose(masked.masked_mean(X, MASK, axis=0), [2.0, 1.5, 0.5])


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_a_mask_of_numbers_counts_where_it_is_not_zero(dtype):
    assert float(masked.masked_mean(X, MASK.astype(dtype))) == pytest.approx(np.mean(KEPT))


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten(shift_mean, ddof):
    got = np.asarray(masked.whiten(X, MASK, shift_mean=shift_mean, ddof=ddof))
    kept = np.array(KEPT)
    want = (kept - kept.mean()) / np.sqrt(kept.var(ddof=ddof) + 1e-8)
    want = want if shift_mean else want + kept.mean()
    np.testing.assert_allclose(got[MASK], want, rtol=1e-5)
    assert (got[~MASK] == 0).all()


def test_whiten_of_a_constant_is_finite():
    np.testing.assert_array_equal(masked.whiten(jnp.full((2, 3), 7.0), MASK), np.zeros((2, 3)))


def test_whiten_eps():
    got = np.asarray(masked.whiten(np.array([1.0, -1.0]), np.ones(2), eps=3.0))
    np.testing.assert_allclose(got, [0.5, -0.5])


def test_nothing_kept_is_zero():
    none = np.zeros_like(MASK)
    assert float(masked.masked_mean(X, none)) == 0
    assert float(masked.masked_var(X, none, ddof=1)) == 0
    np.testing.assert_array_equal(masked.whiten(X, none), np.zeros_like(X))


FUNCTIONS = {
    "sum": masked.masked_sum,
    "mean": masked.masked_mean,
    "var": masked.masked_var,
    "whiten": lambda x, mask: jnp.sum(masked.whiten(x, mask) ** 3),
    "segments": lambda x, mask: masked.segment_sum(x, mask.astype(np.int32), 1)[0, 0],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_masked_reaches_neither_value_nor_gradient(name):
    function = FUNCTIONS[name]
    clean = np.where(MASK, X, 0.0)
    value, grad = jax.value_and_grad(function)(jnp.asarray(X), MASK)
    want, want_grad = jax.value_and_grad(function)(jnp.asarray(clean), MASK)
    assert np.isfinite(value)
    assert float(value) == float(want)
    np.testing.assert_array_equal(grad, want_grad)
    assert (np.asarray(grad)[~MASK] == 0).all()


def test_bfloat16_is_summed_in_float32():
    ones = jnp.ones(1000, jnp.bfloat16)  # bfloat16 cannot count beyond 256
    total = masked.masked_sum(ones, jnp.ones(1000, bool))
    assert total.dtype == jnp.float32
    assert float(total) == 1000


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"x \(2, 3\), mask \(3,\)"):
        masked.masked_mean(X, np.ones(3, bool))


IDS = np.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0], [0, 0, 0, 0, 0, 0]], np.int32)


def test_segment_sum():
    x = np.arange(18, dtype=np.float32).reshape(3, 6)
    x[IDS == 0] = np.nan
    want = np.zeros((3, 3))
    for b in range(3):
        for t in range(6):
            if IDS[b, t]:
                want[b, IDS[b, t] - 1] += x[b, t]
    np.testing.assert_array_equal(masked.segment_sum(x, IDS, 3), want)
    np.testing.assert_array_equal(masked.segment_sum(x, IDS, 1), want[:, :1])


def test_last_index():
    want = [[1, 4, 0], [0, 1, 3], [0, 0, 0]]
    got = masked.last_index(IDS, 3)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, want)


def test_segments_need_a_count():
    with pytest.raises(ValueError, match="count=0"):
        masked.last_index(IDS, 0)


def test_rows_split_over_devices_change_nothing():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 12)).astype(np.float32)
    ids = np.sort(rng.integers(0, 4, size=(16, 12)), axis=1).astype(np.int32)
    mesh = jax.make_mesh((8,), ("rows",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
    placed = jax.device_put(x, rows), jax.device_put(ids, rows)
    sums = jax.jit(lambda x, ids: masked.segment_sum(x, ids, 3))(*placed)
    want = np.stack([np.where(ids == s, x, 0).sum(1) for s in (1, 2, 3)], axis=1)
    np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-6)
    assert sums.sharding.is_equivalent_to(rows, 2)
    white = np.asarray(jax.jit(lambda x, ids: masked.whiten(x, ids > 0))(*placed))
    kept = x[ids > 0].astype(np.float64)
    np.testing.assert_allclose(white[ids > 0], (kept - kept.mean()) / kept.std(), rtol=1e-4)


def test_trl_helpers(shared):
    z = np.load(shared / "oracle" / "ppo_helpers.npz")
    x, mask = z["values"], z["mask"]
    np.testing.assert_allclose(masked.masked_mean(x, mask), z["masked_mean"], rtol=1e-5)
    np.testing.assert_allclose(
        masked.masked_mean(x, mask, axis=1), z["masked_mean_axis1"], rtol=1e-5
    )
    np.testing.assert_allclose(masked.masked_var(x, mask, ddof=1), z["masked_var"], rtol=1e-5)
    np.testing.assert_allclose(masked.masked_var(x, mask), z["masked_var_biased"], rtol=1e-5)
    for shift_mean, name in ((True, "masked_whiten"), (False, "masked_whiten_keep_mean")):
        got = np.asarray(masked.whiten(x, mask, shift_mean=shift_mean, ddof=1))
        np.testing.assert_allclose(got[mask], z[name][mask], rtol=1e-5, atol=1e-6)
