"""PPO's relatives, options of scores and of the critic: each against its own plain numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from test_ppo import KEY, length_reward, prompts

from jaxalign.algorithms import ppo
from jaxalign.algorithms.ppo.advantages import CRITIC_FREE
from jaxalign.algorithms.ppo.config import ESTIMATORS
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import make_eval
from jaxalign.types import RolloutBatch, Weighted

RLOO = ppo.Config(
    max_new_tokens=6, stop_tokens=(5, 9), temperature=0.8, kl_coef=0.3,
    advantage_estimator="rloo", samples=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def policy():
    return init_state(
        ppo.init_params(tiny.random_params(tiny.DECODER, seed=1)),
        ppo.make_optimizer(optax.sgd(0.1)),
    )


@pytest.fixture(scope="module")
def reference():
    return tiny.random_params(tiny.DECODER, seed=4)


def prepare(config, reward_fn=length_reward):
    return ppo.make_prepare(tiny.DECODER, None, reward_fn, config)


@pytest.fixture(scope="module")
def rollout(policy, reference):
    return prepare(RLOO)(KEY, policy, reference, prompts(rows=3, filled=2))


def again(config, state, reference, rollout, **changes):
    """The same answers under other options: the half of `prepare` that follows sampling."""
    # `prepare` cuts the last column off, which predicts nothing.
    tokens = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), rollout.tokens)
    sampled = jnp.pad(rollout.sampler_logprobs, ((0, 0), (0, 1)))
    if rollout.answer_mask is not None:
        raise ValueError("wanted a rollout without filters")
    experience = ppo.make_experience(tiny.DECODER, None, config)
    given = {"scores": rollout.scores, "finished": rollout.finished} | changes
    return experience(state, reference, tokens, given["scores"], given["finished"], sampled)


def test_every_estimator_has_a_function():
    """What `Config` admits and what `experience` looks up are one list."""
    assert set(ESTIMATORS) == {"gae", *CRITIC_FREE}


def test_advantages_are_whitened_where_the_option_says_so(policy, reference, rollout):
    """RLOO's are not by default, REINFORCE++'s are: each the other way round."""
    mask = np.asarray(rollout.tokens.loss_mask)
    raw = np.asarray(rollout.advantages, np.float64)[mask]
    white = again(dataclasses.replace(RLOO, whiten_advantages=True), policy, reference, rollout)
    want = (raw - raw.mean()) / raw.std()
    np.testing.assert_allclose(np.asarray(white.advantages)[mask], want, rtol=1e-3, atol=1e-4)
    config = dataclasses.replace(RLOO, advantage_estimator="reinforce++", whiten_advantages=False)
    plain = again(config, policy, reference, rollout)
    # γ = 1: the rewards from a token on.
    rewards = np.asarray(rollout.rewards, np.float64)
    want = rewards[:, ::-1].cumsum(1)[:, ::-1][mask]
    np.testing.assert_allclose(np.asarray(plain.advantages)[mask], want, rtol=1e-3, atol=1e-4)


def test_answers_to_a_prompt_are_adjacent_and_read_the_same_prompt(rollout):
    inputs = np.asarray(rollout.tokens.inputs)[:, :4].reshape(3, 4, 4)
    assert (inputs == inputs[:, :1]).all()
    assert rollout.old_values is None
    assert rollout.returns is None
    answers = np.asarray(rollout.tokens.targets)[:, 4:].reshape(3, 4, -1)
    assert not (answers[1] == answers[1, :1]).all()
    np.testing.assert_array_equal(rollout.valid, [True] * 8 + [False] * 4)


def test_samples_of_one_prompt_have_the_logprobs_of_samples_alone(rollout):
    """The prompt is read once for all its answers; the trainer reads every row whole."""
    mask = np.asarray(rollout.tokens.loss_mask)
    ours, theirs = (np.asarray(x)[mask] for x in (rollout.sampler_logprobs, rollout.old_logprobs))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert np.abs(theirs).sum() > 10


def sums(rollout):
    """Σ_t r_t of each answer, r = −β kl and the score at the end."""
    gaps = np.asarray(rollout.old_logprobs - rollout.ref_logprobs, np.float64)
    return np.asarray(rollout.scores, np.float64) - 0.3 * gaps.sum(1)


def test_leave_one_out_advantages_of_shaped_rewards(rollout):
    """As TRL's RLOO: the KL is in the reward that is compared, and all tokens get the same."""
    total = sums(rollout)[:8].reshape(2, 4)
    want = (total - (total.sum(1, keepdims=True) - total) / 3).reshape(-1)
    mask = np.asarray(rollout.tokens.loss_mask)
    got = np.asarray(rollout.advantages)
    np.testing.assert_allclose(got[:8], want[:, None] * mask[:8], rtol=1e-4, atol=1e-4)
    assert not got[8:].any()


def test_group_relative_advantages(rollout, policy, reference):
    config = dataclasses.replace(
        RLOO, advantage_estimator="grpo", kl_in="loss", kl_estimator="k3", whiten_ddof=1
    )
    got = again(config, policy, reference, rollout)
    scores = np.asarray(rollout.scores, np.float64)[:8].reshape(2, 4)
    centred = scores - scores.mean(1, keepdims=True)
    want = (centred / (scores.std(1, ddof=1, keepdims=True) + 1e-4)).reshape(-1)
    mask = np.asarray(rollout.tokens.loss_mask)
    np.testing.assert_allclose(got.advantages[:8], want[:, None] * mask[:8], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_plus_plus(rollout, policy, reference, baseline):
    """A_t = s − b − β Σ_{k ≥ t} kl_k, then mean 0 and variance 1 over all tokens."""
    name = "reinforce++_baseline" if baseline else "reinforce++"
    got = again(dataclasses.replace(RLOO, advantage_estimator=name), policy, reference, rollout)
    mask = np.asarray(rollout.tokens.loss_mask)
    gaps = np.where(mask, np.asarray(rollout.old_logprobs - rollout.ref_logprobs, np.float64), 0)
    scores = np.asarray(rollout.scores, np.float64).reshape(3, 4)
    if baseline:
        scores = scores - scores.mean(1, keepdims=True)
    raw = scores.reshape(-1, 1) - 0.3 * gaps[:, ::-1].cumsum(1)[:, ::-1]
    want = (raw - raw[mask].mean()) / raw[mask].std()
    np.testing.assert_allclose(np.asarray(got.advantages)[mask], want[mask], rtol=1e-4, atol=1e-4)


def test_answers_that_leave_the_loss_are_counted_and_stay_in_the_baseline(
    rollout, policy, reference
):
    config = dataclasses.replace(RLOO, mask_truncated=True, skip_equal_groups=True, kl_coef=0.0)
    scores = np.array([1.0, 1, 1, 1, 1, 2, 3, 4, 0, 0, 0, 0], np.float32)
    finished = np.array([1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0], bool)
    got = again(config, policy, reference, rollout, scores=scores, finished=finished)
    trained = np.asarray(got.tokens.loss_mask).any(1)
    np.testing.assert_array_equal(np.flatnonzero(trained), [5, 6, 7])
    first = [float(row[m][0]) for row, m in
             zip(np.asarray(got.advantages), np.asarray(got.tokens.loss_mask), strict=True)
             if m.any()]  # fmt: skip
    np.testing.assert_allclose(first, [2 - 8 / 3, 3 - 7 / 3, 4 - 2], rtol=1e-5)
    metrics = {k: float(v) for k, v in ppo.rollout_metrics(got, samples=4).items()}
    assert metrics["response/trained"] == pytest.approx(3 / 8)
    assert metrics["groups/equal"] == pytest.approx(1 / 2)
    whole = ppo.rollout_metrics(rollout)
    assert metrics["objective/kl"] == pytest.approx(float(whole["objective/kl"]), rel=1e-5)
    lengths = np.asarray(rollout.tokens.loss_mask).sum(1)[:8]
    assert metrics["response/length_min"] == lengths.min()
    assert metrics["response/length_max"] == lengths.max()
    assert metrics["val/num_eos_tokens"] == 7
    assert "critic/explained_variance" not in metrics


def test_prompts_with_nothing_to_learn_from_give_their_places_to_others(rollout):
    """Whole groups, in order, each once; of another width, padded with what no mask reads."""
    other = jax.tree.map(lambda x: x[::-1], rollout)  # padding first, then the groups turned round
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 3))) if x.ndim > 1 else x, other)
    alike, unlike, padding = [1.0, 1, 1, 1], [1.0, 2, 3, 4], [0.0] * 4
    first = rollout._replace(scores=np.array(alike + unlike + padding, np.float32))
    second = wide._replace(scores=np.array(padding + unlike + alike, np.float32))
    assert ppo.count_equal_groups(first, 4) == 1

    filled, left = ppo.fill_equal_groups(first, second, 4)
    assert left == 0
    for got, mine, theirs in zip(*map(jax.tree.leaves, (filled, first, second)), strict=True):
        assert got.shape == (12, *theirs.shape[1:])
        got, mine, theirs = (np.asarray(x) for x in (got, mine, theirs))
        np.testing.assert_array_equal(got[:4], theirs[4:8])
        if mine.ndim > 1:
            assert not got[4:, mine.shape[1] :].any()
            got = got[:, : mine.shape[1]]
        np.testing.assert_array_equal(got[4:], mine[4:])
    assert int(filled.tokens.loss_mask[4:].sum()) == int(first.tokens.loss_mask[4:].sum())

    # What the other one cannot fill is told.
    same, left = ppo.fill_equal_groups(first, first, 4)
    assert left == 0
    np.testing.assert_array_equal(same.scores[:4], unlike)
    none = second._replace(scores=np.array(padding + alike + alike, np.float32))
    same, left = ppo.fill_equal_groups(first, none, 4)
    assert left == 1
    assert same is first


# The loss, on a table of logits: five answers of 1 to 5 tokens, one row each.


@dataclasses.dataclass(frozen=True)
class Table:
    """A model whose parameters are its logits."""

    def apply(self, params, inputs, positions=None, segment_ids=None):
        return params["logits"]

    def head(self, params):
        return jnp.eye(7)


@pytest.fixture(scope="module")
def table():
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(5, 6, 7))
    targets = rng.integers(0, 7, (5, 6)).astype(np.int32)
    mask = np.arange(6)[None] < 1 + np.arange(5)[:, None]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    new = np.take_along_axis(logprobs, targets[..., None], -1)[..., 0]
    old, ref = (new + scale * rng.normal(size=new.shape) for scale in (0.3, 0.5))
    ones = np.ones((5, 6), np.int32)
    tokens = tiny.TokenBatch(0 * ones, targets, 0 * ones, ones, mask)
    advantages = np.repeat(rng.normal(size=(5, 1)), 6, axis=1)
    batch = RolloutBatch(
        tokens,
        *(np.where(mask, x, np.nan).astype(np.float32) for x in (old, ref)),
        None,
        np.where(mask, advantages, np.nan).astype(np.float32),
        None,
    )
    return (
        {"policy": {"logits": jnp.asarray(logits, jnp.float32)}},
        batch,
        new,
        old,
        ref,
        advantages,
    )


GRPO_LOSSES = {
    "grpo": {"loss_aggregation": "sequence"},
    "dr_grpo": {"loss_aggregation": "constant"},
    "dapo": {"loss_aggregation": "token", "clip_range_high": 0.28},
    "gspo": {
        "loss_aggregation": "sequence",
        "importance_sampling_level": "sequence",
        "clip_range": 0.05,
        "clip_range_high": 0.08,
    },
}


@pytest.mark.parametrize("name", GRPO_LOSSES)
def test_losses_of_the_relatives_by_a_loop(table, name):
    """The formulas of TRL's GRPOTrainer, an answer and a token at a time, with β · k3."""
    params, batch, new, old, ref, advantages = table
    options = GRPO_LOSSES[name]
    config = ppo.Config(
        max_new_tokens=6, advantage_estimator="grpo", samples=5, kl_in="loss", kl_coef=0.04,
        kl_estimator="k3", **options,
    )  # fmt: skip
    low, high = config.clip_range, config.clip_range_high or config.clip_range
    per_answer, clipped = [], 0
    for b in range(5):
        losses = []
        for t in range(b + 1):
            gap = new[b, t] - old[b, t]
            if name == "gspo":
                gap = np.mean(new[b, : b + 1] - old[b, : b + 1])
            ratio, a = np.exp(gap), advantages[b, t]
            bounded = min(max(ratio, 1 - low), 1 + high)
            clipped += min(ratio * a, bounded * a) < ratio * a
            d = ref[b, t] - new[b, t]
            losses.append(-min(ratio * a, bounded * a) + 0.04 * (np.exp(d) - d - 1))
        per_answer.append(losses)
    flat = np.concatenate(per_answer)
    want = {
        "grpo": np.mean([np.mean(x) for x in per_answer]),
        "gspo": np.mean([np.mean(x) for x in per_answer]),
        "dr_grpo": flat.sum() / (5 * 6),
        "dapo": flat.mean(),
    }
    assert 0 < clipped < 15
    got = make_eval(ppo.make_loss(Table(), None, config))(ppo_state(params), batch)
    np.testing.assert_allclose(got["loss/policy"].mean(), want[name], rtol=1e-5)
    np.testing.assert_allclose(got["policy/clipfrac_avg"].mean(), clipped / 15, rtol=1e-5)


def ppo_state(params):
    return init_state(params, optax.sgd(0.0))


class Experts(Table):
    """A table with a loss term of its own, of 2 a token, as a mixture of experts has."""

    extra_terms = ("router",)

    def apply_with_losses(self, params, inputs, positions=None, segment_ids=None):
        count = jnp.sum(segment_ids > 0, dtype=jnp.float32)
        return params["logits"], {"router": Weighted(2 * count, count)}


def test_terms_of_the_models_own_join_the_loss(table):
    params, batch, *_ = table
    config = ppo.Config(advantage_estimator="reinforce++", ptx_coef=1.0)
    batch = batch._replace(ptx=batch.tokens)
    losses = {}
    for model in (Table(), Experts()):
        step = jax.jit(ppo.make_step(model, None, optax.sgd(0.0), config))
        _, metrics = step(ppo_state(params), batch)
        losses[type(model)] = float(metrics["loss"])
    np.testing.assert_allclose(losses[Experts] - losses[Table], 2, rtol=1e-5)
    assert metrics["weight/router"] == 60  # rollout and text, 30 positions each
    assert metrics["router"] == 2


def test_text_joins_the_loss_by_its_mean_token(table):
    params, batch, new, *_ = table
    text = batch.tokens
    config = ppo.Config(advantage_estimator="reinforce++", ptx_coef=0.7, temperature=0.5)
    loss = ppo.make_loss(Table(), None, config)
    got = make_eval(loss)(ppo_state(params), batch._replace(ptx=text))
    # Without the temperature: it belongs to sampling.
    want = -new[text.loss_mask].mean()
    np.testing.assert_allclose(got["loss/ptx_avg"].mean(), want, rtol=1e-5)
    np.testing.assert_allclose(got["loss/ptx"].mean(), 0.7 * want, rtol=1e-5)
    with pytest.raises(ValueError, match="ptx_coef > 0 and no text"):
        loss.count(batch)


# Scores


def test_scores_are_calibrated_normalised_and_clipped_in_this_order(policy, reference, rollout):
    config = dataclasses.replace(
        RLOO, normalize_scores=True, reward_clip=1.0, missing_eos_penalty=0.5, kl_coef=0.0
    )
    stats = ppo.ScoreStats(count=10, mean=1.0, squares=40.0)
    got = prepare(config)(
        KEY, policy, reference, prompts(rows=3, filled=2), calibration=(2.0, 4.0),
        score_stats=stats,
    )  # fmt: skip
    raw = np.asarray(rollout.scores, np.float64)[:8]  # the same key: the same answers
    finished = np.asarray(got.finished)[:8]
    scores = (raw - 2) / 4 - 0.5 * ~finished
    np.testing.assert_allclose(got.scores[:8], scores, rtol=1e-5)
    # Mean 1 and variance 4 over the ten of before are Σx = 10 and Σx² = 50.
    mean = (10 + scores.sum()) / 18
    std = np.sqrt((50 + np.square(scores).sum()) / 18 - mean**2)
    scaled = np.clip((scores - mean) / std, -1, 1)
    np.testing.assert_allclose(got.scaled_scores[:8], scaled, rtol=1e-4)
    np.testing.assert_allclose(np.asarray(got.rewards).sum(1)[:8], scaled, rtol=1e-4)
    after = ppo.next_score_stats(stats, got)
    np.testing.assert_allclose([after.count, after.mean, after.std], [18, mean, std], rtol=1e-5)
    metrics = ppo.rollout_metrics(got)
    np.testing.assert_allclose(metrics["objective/scores"], scores.mean(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/non_score_reward"], 0, atol=1e-6)


def test_running_statistics_in_parts_are_those_of_the_whole():
    rng = np.random.default_rng(0)
    x, valid = 5 + rng.normal(size=60), rng.random(60) < 0.7
    stats = ppo.ScoreStats()
    assert stats.std == 1.0
    for part, kept in zip(np.split(x, 6), np.split(valid, 6), strict=True):
        stats = stats.add(part, kept)
    np.testing.assert_allclose(
        [stats.count, stats.mean, stats.std], [valid.sum(), x[valid].mean(), x[valid].std()], 1e-12
    )


def test_calibration_gives_the_reference_mean_0_and_variance_1(reference):
    many = prompts(rows=8)
    given = []

    def reward(tokens, prompts):
        given.append(length_reward(tokens, prompts))
        return given[-1]

    shift, scale = ppo.calibrate(KEY, tiny.DECODER, reference, many, reward, RLOO, "mean_std")
    np.testing.assert_allclose([shift, scale], [given[0].mean(), given[0].std()], rtol=1e-6)
    assert len(given[0]) == 32
    assert ppo.calibrate(KEY, tiny.DECODER, reference, many, reward, RLOO, "mean")[1] == 1.0


# The critic


def test_critic_warms_up_alone():
    """Neither the policy nor its moments move; then both do, as if nothing had been before."""
    tx = ppo.make_optimizer(optax.adam(0.1), optax.adam(0.1), critic_warmup=2)
    params = ppo.init_params({"w": jnp.ones(3)}, {"w": jnp.ones(3)})
    grads = jax.tree.map(jnp.ones_like, params)
    state, fresh = tx.init(params), optax.adam(0.1).init(params["policy"])
    for update in range(4):
        updates, state = jax.jit(tx.update)(grads, state, params)
        assert bool(jnp.any(updates["policy"]["w"] != 0)) == (update >= 2)
        assert bool(jnp.all(updates["critic"]["w"] != 0))
        inner = state.inner_states["policy"].inner_state.inner_state
        assert int(inner[0].count) == max(0, update - 1)
    want, fresh = optax.adam(0.1).update(grads["policy"], fresh)
    np.testing.assert_allclose(updates["policy"]["w"], want["w"], rtol=1e-5)


def test_shared_critic_reads_and_trains_the_policys_trunk(reference):
    config = ppo.Config(
        max_new_tokens=6, stop_tokens=(5, 9), shared_critic=True, vf_coef=1.0, kl_coef=0.3
    )
    trunk = tiny.random_params(tiny.DECODER, seed=1)
    head = {"score": {"kernel": 0.3 * jnp.ones((32, 1))}}
    state = init_state(ppo.init_params(trunk, head), optax.sgd(0.0))
    make = ppo.make_prepare(tiny.DECODER, tiny.SCORER, length_reward, config)
    rollout = make(KEY, state, reference, prompts())
    tokens = rollout.tokens
    hidden = jax.jit(tiny.DECODER.apply)(trunk, tokens.inputs, tokens.positions, tokens.segment_ids)
    mask = np.asarray(rollout.value_mask)
    want = 0.3 * np.asarray(hidden).sum(-1)
    np.testing.assert_allclose(np.asarray(rollout.old_values)[mask], want[mask], 1e-4, 1e-4)
    # With advantages of 0 nothing but the values moves the trunk.
    still = rollout._replace(advantages=jnp.zeros_like(rollout.advantages))
    loss = ppo.make_loss(tiny.DECODER, tiny.SCORER, config)

    def value(params):
        totals, _ = loss.terms(params, still)
        return sum(totals.values())

    grads = jax.jit(jax.grad(value))(state.params)
    assert float(optax.tree.norm(grads["policy"])) > 1e-2
    assert float(optax.tree.norm(grads["critic"])) > 1e-2
    error = np.where(mask, want - np.asarray(rollout.returns), 0)
    by_hand = np.einsum("bt,btd->d", error, np.asarray(hidden))
    np.testing.assert_allclose(grads["critic"]["score"]["kernel"][:, 0], by_hand, 1e-3, 1e-3)


def test_a_critic_too_many_or_too_few_is_refused():
    with pytest.raises(ValueError, match=r"'rloo' with critic=Scorer: wanted None"):
        ppo.make_loss(tiny.DECODER, tiny.SCORER, RLOO)
    with pytest.raises(ValueError, match=r"'gae' with critic=None: wanted a critic"):
        ppo.make_loss(tiny.DECODER, None, ppo.Config())


# Temperature and β as arguments


def test_temperature_and_kl_coef_compile_nothing_anew(policy, reference):
    config = dataclasses.replace(RLOO, kl_in="loss")
    make = prepare(config)
    step = jax.jit(ppo.make_step(tiny.DECODER, None, ppo.make_optimizer(optax.sgd(0.0)), config))
    few = prompts(rows=3, filled=2)
    state = init_state(policy.params, ppo.make_optimizer(optax.sgd(0.0)))
    first = make(KEY, state, reference, few)
    _, calm = step(state, first)
    with jax.no_tracing():
        other = make(KEY, state, reference, few, 0.05, temperature=1.3)
        _, hot = step(state, other)
    assert float(other.temperature[0]) == pytest.approx(1.3)
    # Sampler, trainer and loss agree on the temperature, whatever it is.
    np.testing.assert_allclose(hot["val/ratio"], 1.0, atol=1e-5)
    np.testing.assert_allclose(calm["val/ratio"], 1.0, atol=1e-5)
    mask = np.asarray(other.tokens.loss_mask)
    gap = np.asarray(other.old_logprobs - other.ref_logprobs, np.float64)[mask]
    np.testing.assert_allclose(
        hot["loss"] - hot["loss/policy_avg"], 0.05 * gap.mean(), rtol=1e-3, atol=1e-5
    )


def test_the_controller_follows_its_closed_form_for_a_hundred_iterations():
    """c_n = c_0 Π (1 + clip(KL_i/target − 1, ±0.2) · n/horizon), the product in float64."""
    config = ppo.Config(kl_target=6.0, kl_horizon=10000.0)
    measured = 6 * np.exp(np.random.default_rng(0).normal(size=100))
    coef, want = 0.1, 0.1
    for kl in measured:
        coef = ppo.next_kl_coef(coef, float(kl), config, rows=256)
        want *= 1 + np.clip(kl / 6 - 1, -0.2, 0.2) * 256 / 10000
    np.testing.assert_allclose(coef, want, rtol=1e-5)
    assert abs(want / 0.1 - 1) > 0.01
