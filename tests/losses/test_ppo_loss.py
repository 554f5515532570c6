"""PPO's pieces: hand values, loops, properties, extremes, and TRL's numbers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.losses import ppo
from jaxalign.losses.masked import keep, weighted, whiten

# GAE ---------------------------------------------------------------------------------------


def gae_loop(rewards, values, mask, gamma, lam):
    """A row at a time, over a list of its valid positions, in float64."""
    advantages = np.zeros(rewards.shape)
    for b in range(len(rewards)):
        valid = [t for t in range(rewards.shape[1]) if mask[b, t]]
        for i, t in enumerate(valid):  # the definition: A_t = Σ_k (γλ)^k δ_(t+k)
            for k, u in enumerate(valid[i:]):
                following = valid[i + k + 1 :]
                next_value = values[b, following[0]] if following else 0.0
                delta = rewards[b, u] + gamma * next_value - values[b, u]
                advantages[b, t] += (gamma * lam) ** k * delta
    return advantages, np.where(mask, advantages + values, 0.0)


@pytest.fixture
def row():
    """One row of rewards, values and a mask with padding on both sides and a gap."""
    rng = np.random.default_rng(3)
    mask = np.array(
        [
            [0, 0, 1, 1, 1, 0, 0, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        ],
        bool,
    )
    return rng.normal(size=(4, 10)), rng.normal(size=(4, 10)), mask


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (0.8, 1.0)])
def test_gae_loop(row, gamma, lam):
    want = gae_loop(*row, gamma, lam)
    got = ppo.gae(*row, gamma=gamma, lam=lam)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5, atol=1e-6)


def test_gae_defaults_are_gamma_1_lambda_095(row):
    np.testing.assert_allclose(ppo.gae(*row)[0], gae_loop(*row, 1.0, 0.95)[0], rtol=1e-5, atol=1e-6)


def test_gae_by_hand():
    # V = (.1, .2, .3), score 1 on the last token, λ = .95
    advantages, _ = ppo.gae(
        np.array([[0.0, 0.0, 1.0]]), np.array([[0.1, 0.2, 0.3]]), np.ones((1, 3), bool)
    )
    # δ = (.1, .1, .7); A = (.1 + .95 · .765, .1 + .95 · .7, .7)
    np.testing.assert_allclose(advantages, [[0.82675, 0.765, 0.7]], rtol=1e-6)


def test_gae_lambda_0_is_the_one_step_error():
    advantages, returns = ppo.gae(
        np.array([[1.0, 2.0, 3.0]]), np.array([[4.0, 5.0, 6.0]]), np.ones((1, 3)),
        gamma=0.5, lam=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(advantages, [[1 + 2.5 - 4, 2 + 3 - 5, 3 - 6]])
    np.testing.assert_allclose(returns, [[3.5, 5.0, 3.0]])


def test_gae_lambda_1_returns_are_the_sum_of_rewards():
    _, returns = ppo.gae(
        np.array([[1.0, 2.0, 3.0]]), np.array([[4.0, 5.0, 6.0]]), np.ones((1, 3)), lam=1.0
    )
    np.testing.assert_allclose(returns, [[6.0, 5.0, 3.0]], rtol=1e-6)


def test_gae_gap_is_as_if_it_were_not_there(row):
    rewards, values, mask = row
    dense = mask[0]
    short = [x[:1, dense] for x in (rewards, values, mask)]
    np.testing.assert_allclose(
        np.asarray(ppo.gae(*row, gamma=0.9)[0])[0, dense],
        np.asarray(ppo.gae(*short, gamma=0.9)[0])[0],
        rtol=1e-6,
    )


def test_gae_padding_and_nan_are_invisible(row):
    rewards, values, mask = row
    poison = np.where(mask, 0, np.nan)
    pad = ((0, 0), (3, 5))
    wide = [np.pad(x, pad, constant_values=np.inf) for x in (rewards + poison, values + poison)]
    got = ppo.gae(*wide, np.pad(mask, pad), gamma=0.9)
    for wide_part, part in zip(got, ppo.gae(*row, gamma=0.9), strict=True):
        np.testing.assert_array_equal(np.asarray(wide_part)[:, 3:-5], part)
        assert not np.asarray(wide_part)[:, :3].any()
        assert not np.asarray(wide_part)[~np.pad(mask, pad)].any()
    grad = jax.grad(lambda v: ppo.gae(wide[0], v, np.pad(mask, pad))[1].sum())(jnp.asarray(wide[1]))
    assert np.isfinite(grad).all()


def test_gae_errors():
    x = np.zeros((1, 2))
    with pytest.raises(ValueError, match=r"gamma=1\.5"):
        ppo.gae(x, x, x, gamma=1.5)
    with pytest.raises(ValueError, match=r"lam=-0\.1"):
        ppo.gae(x, x, x, lam=-0.1)
    with pytest.raises(ValueError, match=r"values \(1, 3\)"):
        ppo.gae(x, np.zeros((1, 3)), x)


# rewards -----------------------------------------------------------------------------------

KL = np.array([[9.0, 1.0, 2.0, 9.0], [9.0, 9.0, 1.0, 2.0], [9.0, 9.0, 9.0, 9.0]])
ANSWER = np.array([[0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], bool)
SCORES = np.array([5.0, 7.0, 11.0])


def test_score_on_the_last_token():
    rewards, valid = ppo.token_rewards(KL, SCORES, ANSWER, kl_coef=0.5)
    np.testing.assert_allclose(rewards, [[0, -0.5, 4, 0], [0, 0, -0.5, 6], [0, 0, 0, 0]])
    np.testing.assert_array_equal(valid, ANSWER)


def test_score_after_the_last_token_where_there_is_room():
    rewards, valid = ppo.token_rewards(KL, SCORES, ANSWER, kl_coef=0.5, score_at="after_eos")
    np.testing.assert_allclose(rewards, [[0, -0.5, -1, 5], [0, 0, -0.5, 6], [0, 0, 0, 0]])
    np.testing.assert_array_equal(valid, [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("score_at", ["eos", "after_eos"])
def test_rewards_ignore_what_is_masked(score_at):
    options = {"kl_coef": 0.5, "score_at": score_at}
    poisoned = np.where(ANSWER, KL, np.nan)
    scores = np.array([5.0, 7.0, np.nan])  # the last row has no answer
    got, _ = ppo.token_rewards(poisoned, scores, ANSWER, **options)
    np.testing.assert_array_equal(got, ppo.token_rewards(KL, SCORES, ANSWER, **options)[0])
    np.testing.assert_allclose(got.sum(1), [5 - 1.5, 7 - 1.5, 0])


def test_token_rewards_errors():
    with pytest.raises(ValueError, match="score_at='pad': wanted one of eos, after_eos"):
        ppo.token_rewards(KL, SCORES, ANSWER, kl_coef=0.5, score_at="pad")
    with pytest.raises(ValueError, match=r"scores \(2,\)"):
        ppo.token_rewards(KL, SCORES[:2], ANSWER, kl_coef=0.5)
    with pytest.raises(ValueError, match=r"mask \(3, 3\)"):
        ppo.token_rewards(KL, SCORES, ANSWER[:, 1:], kl_coef=0.5)


def test_missing_eos_penalty():
    got = ppo.missing_eos_penalty(np.array([1.0, -2.0]), np.array([True, False]), 0.5)
    np.testing.assert_allclose(got, [1.0, -2.5])
    with pytest.raises(ValueError, match="penalty=-1"):
        ppo.missing_eos_penalty(np.zeros(2), np.zeros(2), -1)
    with pytest.raises(ValueError, match=r"finished \(3,\)"):
        ppo.missing_eos_penalty(np.zeros(2), np.zeros(3), 1)


# KL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("estimator", "want"), [("k1", [2, -1, 0]), ("k2", [2, 0.5, 0]), ("k3", None)]
)
def test_kl_by_hand(estimator, want):
    want = [np.exp(-2) - 1 + 2, np.exp(1) - 1 - 1, 0] if want is None else want
    got = ppo.kl(np.array([-1.0, -3.0, -2.0]), np.array([-3.0, -2.0, -2.0]), estimator)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_k3_keeps_its_digits():
    d = 1e-4  # d²/2 − d³/6 + …
    got = float(ppo.kl(jnp.float32(d), jnp.float32(0), "k3"))
    assert got == pytest.approx(d**2 / 2, rel=5e-3)


@pytest.mark.parametrize("estimator", ppo.KL_ESTIMATORS)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_kl_at_extremes(estimator, gap):
    value, grad = jax.value_and_grad(lambda x: ppo.kl(x, jnp.zeros(()), estimator))(gap)
    assert np.isfinite(value)
    assert np.isfinite(grad)


def test_k3_points_home_however_far_the_policy_has_gone():
    """d/dx (e^(−d) − 1 + d) = 1 − e^(−d), held at d = −20 beyond it; value on that tangent."""
    value = jax.value_and_grad(lambda x: ppo.kl(x, jnp.zeros(()), "k3"))
    slope = 1 - np.exp(20.0)
    for gap in (-19.0, -20.0, -25.0, -1000.0):
        near = max(gap, -20.0)
        want = np.exp(-near) - 1 + near + slope * min(gap + 20.0, 0.0)
        got, gradient = value(gap)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        np.testing.assert_allclose(gradient, 1 - np.exp(-near), rtol=1e-5)
    np.testing.assert_allclose(value(50.0), (49.0, 1.0), rtol=1e-6)


def test_kl_errors():
    with pytest.raises(ValueError, match="estimator='k4': wanted one of k1, k2, k3"):
        ppo.kl(np.zeros(1), np.zeros(1), "k4")
    with pytest.raises(ValueError, match=r"ref_logprobs \(2,\)"):
        ppo.kl(np.zeros(1), np.zeros(2))


@pytest.mark.parametrize(
    ("measured", "want"),
    [(6.0, 0.1), (6.6, 0.1 * (1 + 0.1 * 0.25)), (600.0, 0.1 * 1.05), (0.0, 0.1 * 0.95)],
)
def test_adaptive_kl_coef(measured, want):
    got = ppo.adaptive_kl_coef(0.1, measured, target=6.0, horizon=1000, batch_size=250)
    assert float(got) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("name", ["target", "horizon"])
def test_adaptive_kl_coef_errors(name):
    options = {"target": 6.0, "horizon": 1e4, name: 0.0}
    with pytest.raises(ValueError, match=f"{name}=0.0"):
        ppo.adaptive_kl_coef(0.1, 1.0, batch_size=1, **options)


# policy loss -------------------------------------------------------------------------------


def test_policy_loss_at_ratio_1_is_minus_the_advantage():
    rng = np.random.default_rng(4)
    logprobs, advantages = rng.normal(size=(2, 3, 5)).astype(np.float32)
    value, grad = jax.value_and_grad(
        lambda x: ppo.policy_loss(x, logprobs, advantages, dual_clip=3.0).sum()
    )(jnp.asarray(logprobs))
    np.testing.assert_array_equal(ppo.policy_loss(logprobs, logprobs, advantages), -advantages)
    assert float(value) == pytest.approx(-advantages.sum(), rel=1e-5)
    np.testing.assert_allclose(grad, -advantages, rtol=1e-6)


def policy_loop(new, old, advantages, low, high, dual):
    out = np.zeros(new.shape)
    for i in np.ndindex(new.shape):
        ratio, a = np.exp(new[i] - old[i]), advantages[i]
        out[i] = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
        if dual is not None and a < 0:
            out[i] = min(out[i], -dual * a)
    return out


@pytest.mark.parametrize(
    ("low", "high", "dual"), [(0.2, None, None), (0.2, 0.28, None), (0.1, 0.3, 1.5)]
)
def test_policy_loss_loop(low, high, dual):
    new, old, advantages = np.random.default_rng(5).normal(size=(3, 6, 7)).astype(np.float32)
    got = ppo.policy_loss(
        new, old, advantages, clip_range=low, clip_range_high=high, dual_clip=dual
    )
    want = policy_loop(new, old, advantages, low, low if high is None else high, dual)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_policy_loss_by_hand():
    ratio = np.array([1.5, 0.5, 1.5, 0.5, 10.0])
    advantages = np.array([1.0, 1.0, -1.0, -1.0, -1.0])
    options = {"clip_range": 0.2, "clip_range_high": 0.4}
    got = ppo.policy_loss(np.log(ratio), np.zeros(5), advantages, **options)
    np.testing.assert_allclose(got, [-1.4, -0.5, 1.5, 0.8, 10.0], rtol=1e-6)
    got = ppo.policy_loss(np.log(ratio), np.zeros(5), advantages, dual_clip=3.0, **options)
    np.testing.assert_allclose(got, [-1.4, -0.5, 1.5, 0.8, 3.0], rtol=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_policy_loss_at_extremes(gap, advantage, dual_clip):
    value, grad = jax.value_and_grad(
        lambda x: ppo.policy_loss(x, jnp.zeros(()), jnp.float32(advantage), dual_clip=dual_clip)
    )(gap)
    assert np.isfinite(value)
    assert np.isfinite(grad)


@pytest.mark.parametrize(
    "options",
    [{"clip_range": 0.0}, {"clip_range": 1.0}, {"clip_range_high": 0.0}, {"dual_clip": 1.0}],
)
def test_policy_loss_errors(options):
    with pytest.raises(ValueError, match=next(iter(options)) + "="):
        ppo.policy_loss(np.zeros(1), np.zeros(1), np.zeros(1), **options)


def test_policy_loss_shapes():
    with pytest.raises(ValueError, match=r"advantages \(2,\)"):
        ppo.policy_loss(np.zeros(1), np.zeros(1), np.zeros(2))


# value loss --------------------------------------------------------------------------------


def test_value_loss_by_hand():
    values, old = np.array([1.0, 0.1, -1.0]), np.zeros(3)
    returns = np.array([1.0, 1.0, 1.0])
    got = ppo.value_loss(values, old, returns, clip_range_value=0.5)
    np.testing.assert_allclose(got, [0.125, 0.405, 2.0], rtol=1e-6)
    got = ppo.value_loss(values, old, returns, clip_range_value=None)
    np.testing.assert_allclose(got, [0.0, 0.405, 2.0], rtol=1e-6)


def test_value_loss_before_the_update_is_half_the_squared_error():
    values, returns = np.random.default_rng(6).normal(size=(2, 3, 4)).astype(np.float32)
    grad = jax.grad(lambda v: ppo.value_loss(v, values, returns).sum())(jnp.asarray(values))
    np.testing.assert_allclose(
        ppo.value_loss(values, values, returns), (values - returns) ** 2 / 2, rtol=1e-6
    )
    np.testing.assert_allclose(grad, values - returns, rtol=1e-5)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_value_loss_at_extremes(value):
    got, grad = jax.value_and_grad(ppo.value_loss)(value, jnp.zeros(()), jnp.zeros(()))
    assert np.isfinite(got)
    assert np.isfinite(grad)


def test_value_loss_errors():
    with pytest.raises(ValueError, match=r"clip_range_value=0\.0"):
        ppo.value_loss(np.zeros(1), np.zeros(1), np.zeros(1), clip_range_value=0.0)
    with pytest.raises(ValueError, match=r"returns \(2,\)"):
        ppo.value_loss(np.zeros(1), np.zeros(1), np.zeros(2))


def test_nan_in_a_masked_slot_reaches_no_gradient():
    mask = np.array([[True, True, False]])
    logprobs = jnp.array([[-1.0, -2.0, jnp.nan]])
    old = jnp.array([[-1.5, -2.0, jnp.inf]])

    def loss(x):
        losses = ppo.policy_loss(keep(x, mask), keep(old, mask), keep(old, mask))
        losses += ppo.value_loss(keep(x, mask), keep(old, mask), keep(old, mask))
        losses += ppo.kl(keep(x, mask), keep(old, mask), "k3")
        return weighted(losses, mask).mean()

    value, grad = jax.value_and_grad(loss)(logprobs)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()
    assert float(grad[0, 2]) == 0


# TRL ---------------------------------------------------------------------------------------


def test_golden_rewards_and_returns():
    """TRL 1.12, two rows of one case: kl_coef .05, γ .97, λ .9 (oracle/ppo_rewards_gae, 2)."""
    logprobs = np.array(
        [[-2.7634385, -0.04396081, -4.4520955, -3.745437, -9, -9], [-4.3034353, -9, -9, -9, -9, -9]]
    )
    ref = np.array([[-2.015139, 0.1337226, -5.3538365, -3.6150486, 0, 0], [-4.6944027] + [0] * 5])
    values = np.array(
        [
            [-0.5591494, -2.658192, 0.95207417, -0.018616049, -0.14714253, 8],
            [1.9673525, -0.06644083, 8, 8, 8, 8],
        ]
    )
    mask = np.array([[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]], bool)
    rewards, valid = ppo.token_rewards(
        ppo.kl(logprobs, ref), np.array([2.1201067, 2.5617726]), mask,
        kl_coef=0.05, score_at="after_eos",
    )  # fmt: skip
    _, returns = ppo.gae(rewards, values, valid, gamma=0.97, lam=0.9)
    np.testing.assert_allclose(
        rewards,
        [
            [0.037414968, 0.008884171, -0.04508705, 0.006519413, 2.1201067, 0],
            [-0.01954837, 2.5617726, 0, 0, 0, 0],
        ],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        returns,
        [
            [1.0584962, 1.464978, 1.5621333, 1.8430996, 2.1201067, 0],
            [2.2104344, 2.5617726, 0, 0, 0, 0],
        ],
        rtol=1e-5,
    )


@pytest.mark.parametrize("case", range(6))
def test_trl_rewards_and_advantages(shared, case):
    folder = shared / "oracle"
    z = np.load(folder / "ppo_rewards_gae.npz")
    c = json.loads((folder / "ppo_rewards_gae.json").read_text())[case]
    x = {name: z[f"{case}/in/{name}"] for name in ("logprobs", "ref_logprobs", "values", "scores")}
    want = {
        name: z[f"{case}/out/{name}"]
        for name in ("kl", "scores", "rewards", "returns", "advantages", "contain_eos_token")
    }
    mask = ~z[f"{case}/out/padding_mask"]

    scores = x["scores"]
    if c["missing_eos_penalty"] is not None:
        scores = ppo.missing_eos_penalty(
            scores, want["contain_eos_token"], c["missing_eos_penalty"]
        )
    np.testing.assert_allclose(scores, want["scores"], rtol=1e-5)
    kl = ppo.kl(x["logprobs"], x["ref_logprobs"], c["kl_estimator"])
    np.testing.assert_allclose(keep(kl, mask), want["kl"], rtol=1e-5, atol=1e-6)
    rewards, valid = ppo.token_rewards(kl, scores, mask, kl_coef=c["kl_coef"], score_at="after_eos")
    np.testing.assert_array_equal(valid, ~z[f"{case}/out/padding_mask_p1"])
    if c["whiten_rewards"]:
        rewards = whiten(rewards, valid, shift_mean=False, ddof=1)
    np.testing.assert_allclose(rewards, want["rewards"], rtol=1e-5, atol=1e-6)
    advantages, returns = ppo.gae(rewards, x["values"], valid, gamma=c["gamma"], lam=c["lam"])
    np.testing.assert_allclose(returns, want["returns"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        whiten(advantages, mask, ddof=1), want["advantages"], rtol=1e-5, atol=2e-6
    )


@pytest.mark.parametrize("case", range(3))
def test_trl_loss_and_gradient(shared, case):
    folder = shared / "oracle"
    file = np.load(folder / "ppo_loss.npz")
    z = {name.removeprefix(f"{case}/"): file[name] for name in file if name[0] == str(case)}
    c = json.loads((folder / "ppo_loss.json").read_text())[case]
    mask, valid = ~z["padding_mask"], ~z["padding_mask_p1"]
    window = slice(int(z["context_length"]) - 1, -1)

    def loss(logits, vpred):
        logits = logits[:, window] / (c["temperature"] + 1e-7)
        logprobs = jnp.take_along_axis(
            jax.nn.log_softmax(logits), z["responses"][..., None], axis=-1
        )[..., 0]
        pg = ppo.policy_loss(
            logprobs, z["old_logprobs"], z["advantages"], clip_range=c["cliprange"]
        )
        vf = ppo.value_loss(
            vpred[:, window, 0], z["old_values"], z["returns"],
            clip_range_value=c["cliprange_value"],
        )  # fmt: skip
        pg, vf = weighted(pg, mask).mean(), weighted(vf, valid).mean()
        return pg + c["vf_coef"] * vf, (pg, vf, logprobs)

    (total, (pg, vf, logprobs)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        jnp.asarray(z["logits"]), jnp.asarray(z["vpred"])
    )
    np.testing.assert_allclose(
        np.asarray(logprobs)[mask], z["out/new_logprobs"][mask], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(pg, z["out/pg_loss"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(vf, z["out/vf_loss"], rtol=1e-5)
    np.testing.assert_allclose(total, z["out/loss"], rtol=1e-5)
    np.testing.assert_allclose(grads[0], z["grad_logits"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grads[1], z["grad_vpred"], rtol=1e-5, atol=1e-7)
