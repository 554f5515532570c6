"""What must hold of PPO by its equations: before the first update, of rewards, of mini-batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import make_eval
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings
from jaxalign.types import PromptBatch

CONFIG = ppo.Config(max_new_tokens=6, stop_tokens=(5, 9), temperature=0.8, kl_coef=0.3)
KEY = jax.random.key(3)


def prompts(rows=8, width=5, filled=None):
    """Left-padded prompts of uneven length; the last rows are empty."""
    rng = np.random.default_rng(0)
    filled = rows if filled is None else filled
    lengths = np.where(np.arange(rows) < filled, 1 + np.arange(rows) % width, 0)
    mask = np.arange(width)[None] >= width - lengths[:, None]
    tokens = np.where(mask, rng.integers(10, tiny.VOCAB, (rows, width)), 0).astype(np.int32)
    return PromptBatch(tokens, mask, np.arange(rows, dtype=np.int32))


def length_reward(tokens, prompts):
    """The number of answer tokens, plus a row's first prompt token."""
    return np.asarray(tokens.loss_mask).sum(1) + 0.01 * np.asarray(prompts.tokens[:, -1])


@pytest.fixture(scope="module")
def state():
    policy = tiny.random_params(tiny.DECODER, seed=1)
    critic = tiny.random_params(tiny.SCORER, seed=2)
    return init_state(ppo.init_params(policy, critic), optax.sgd(0.0))


@pytest.fixture(scope="module")
def reference():
    return tiny.random_params(tiny.DECODER, seed=4)


def prepare(config=CONFIG, reward_fn=length_reward):
    return ppo.make_prepare(tiny.DECODER, tiny.SCORER, reward_fn, config)


@pytest.fixture(scope="module")
def rollout(state, reference):
    return prepare()(KEY, state, reference, prompts(filled=7))


def metrics_of(config, state, rollout):
    """Loss and metrics of a rollout, without an update."""
    evaluate = make_eval(ppo.make_loss(tiny.DECODER, tiny.SCORER, config))
    metrics = {name: float(x.mean()) for name, x in evaluate(state, rollout).items()}
    return metrics | {"loss": metrics["loss/policy"] + metrics["loss/value"]}


def test_before_the_first_update_nothing_has_moved(state, rollout):
    metrics = metrics_of(CONFIG, state, rollout)
    mask = np.asarray(rollout.tokens.loss_mask)
    np.testing.assert_allclose(metrics["val/ratio"], 1.0, atol=1e-5)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], 0.0, atol=1e-9)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], 0.0)
    # Whitened advantages have mean 0 over the whole rollout, so take part of it.
    half = jax.tree.map(lambda x: x[:3], rollout)
    want = -np.asarray(rollout.advantages)[:3][mask[:3]].mean()
    assert abs(want) > 1e-2
    np.testing.assert_allclose(
        metrics_of(CONFIG, state, half)["loss/policy_avg"], want, rtol=1e-4, atol=1e-5
    )


def test_advantages_are_white_and_returns_are_not(rollout):
    mask = np.asarray(rollout.tokens.loss_mask)
    white = np.asarray(rollout.advantages)[mask]
    np.testing.assert_allclose([white.mean(), white.var()], [0, 1], atol=1e-4)
    raw = np.asarray(rollout.returns - rollout.old_values)[mask]
    np.testing.assert_allclose(white, (raw - raw.mean()) / raw.std(), rtol=1e-3, atol=1e-4)
    assert np.all(np.asarray(rollout.advantages)[~mask] == 0)


def test_rewards_sum_to_score_minus_kl(rollout, state, reference):
    """Σ_t r_t = score − β Σ_t (log π − log π_ref), row by row."""
    gaps = np.asarray(rollout.old_logprobs - rollout.ref_logprobs)
    assert np.abs(gaps).sum() > 1
    want = np.asarray(rollout.scores) - CONFIG.kl_coef * gaps.sum(1)
    np.testing.assert_allclose(
        np.asarray(rollout.rewards).sum(1)[:7], want[:7], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(rollout.valid, [True] * 7 + [False])
    assert not np.asarray(rollout.rewards)[7].any()
    # A coefficient given to prepare takes the place of the configured one, 0 included.
    other = prepare()(KEY, state, reference, prompts(filled=7), kl_coef=0.0)
    np.testing.assert_allclose(
        np.asarray(other.rewards).sum(1)[:7], np.asarray(other.scores)[:7], rtol=1e-6
    )


def test_logprobs_are_those_of_a_plain_softmax(rollout, state):
    policy = state.params["policy"]
    tokens = rollout.tokens
    hidden = tiny.DECODER.apply(policy, tokens.inputs, tokens.positions, tokens.segment_ids)
    logits = np.asarray(hidden @ policy["head"]["kernel"], np.float64) / CONFIG.temperature
    logz = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, np.asarray(tokens.targets)[..., None], -1)[..., 0]
    mask = np.asarray(tokens.loss_mask)
    np.testing.assert_allclose(np.asarray(rollout.old_logprobs)[mask], (chosen - logz)[mask], 1e-4)
    np.testing.assert_allclose(
        np.asarray(rollout.sampler_logprobs)[mask],
        np.asarray(rollout.old_logprobs)[mask],
        atol=1e-4,
    )


def test_missing_stop_token_costs(state, reference):
    config = dataclasses.replace(CONFIG, missing_eos_penalty=2.5)
    rollout = prepare(config)(KEY, state, reference, prompts())
    targets, mask = np.asarray(rollout.tokens.targets), np.asarray(rollout.tokens.loss_mask)
    lengths = mask.sum(1)
    last = np.array([targets[b, np.flatnonzero(mask[b])[-1]] for b in range(len(mask))])
    stopped = np.isin(last, CONFIG.stop_tokens)
    assert stopped.any()
    assert not stopped.all()
    assert np.all(stopped | (lengths == CONFIG.max_new_tokens))
    np.testing.assert_array_equal(rollout.finished, stopped)
    score = lengths + 0.01 * prompts().tokens[:, -1] - 2.5 * ~stopped
    np.testing.assert_allclose(rollout.scores, score, rtol=1e-6)


def test_kl_in_the_loss_leaves_rewards_alone(state, reference):
    config = dataclasses.replace(CONFIG, kl_in="loss", kl_estimator="k3", vf_coef=0.0)
    rollout = prepare(config)(KEY, state, reference, prompts())
    np.testing.assert_allclose(np.asarray(rollout.rewards).sum(1), rollout.scores, rtol=1e-6)
    mask = np.asarray(rollout.tokens.loss_mask)
    gap = np.asarray(rollout.old_logprobs - rollout.ref_logprobs, np.float64)[mask]
    metrics = metrics_of(config, state, rollout)
    k3 = np.mean(np.exp(-gap) - 1 + gap)
    assert k3 > 0.1
    np.testing.assert_allclose(
        metrics["loss"] - metrics["loss/policy_avg"], CONFIG.kl_coef * k3, rtol=1e-4
    )


def test_entropy_bonus_lowers_the_loss_by_its_mean(state, rollout):
    plain = metrics_of(CONFIG, state, rollout)
    bonus = metrics_of(dataclasses.replace(CONFIG, entropy_coef=0.5), state, rollout)
    np.testing.assert_allclose(
        plain["loss"] - bonus["loss"], 0.5 * plain["policy/entropy_avg"], rtol=1e-4
    )


def test_whitened_rewards_teach_and_plain_ones_are_logged(state, reference, rollout):
    config = dataclasses.replace(CONFIG, whiten_rewards=True, lam=1.0)
    scaled = prepare(config)(KEY, state, reference, prompts(filled=7))
    np.testing.assert_allclose(scaled.rewards, rollout.rewards, 1e-5, 1e-5)
    valued = np.asarray(scaled.value_mask)
    plain = np.asarray(rollout.rewards)[valued]
    seen = np.zeros(valued.shape)
    seen[valued] = (plain - plain.mean()) / plain.std() + plain.mean()
    # With γ = λ = 1 the return of a token is the sum of the rewards from it on.
    want = np.where(valued, seen[:, ::-1].cumsum(1)[:, ::-1], 0)
    np.testing.assert_allclose(scaled.returns, want, 1e-3, 1e-3)


def test_rollout_metrics_by_hand(rollout):
    metrics = {k: float(v) for k, v in ppo.rollout_metrics(rollout).items()}
    rows = slice(0, 7)  # the eighth is empty
    mask = np.asarray(rollout.tokens.loss_mask)[rows]
    new, ref, scores = (
        np.asarray(x)[rows] for x in (rollout.old_logprobs, rollout.ref_logprobs, rollout.scores)
    )
    want = {
        "objective/scores": scores.mean(),
        "objective/scores_std": scores.std(),
        "objective/kl": (new - ref).sum(1).mean(),
        "objective/entropy": -new.sum(1).mean(),
        "objective/non_score_reward": -CONFIG.kl_coef * (new - ref).sum(1).mean(),
        "response/length": mask.sum(1).mean(),
        "response/finished": np.asarray(rollout.finished)[rows].mean(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    valued = np.asarray(rollout.value_mask)
    returns, old = np.asarray(rollout.returns)[valued], np.asarray(rollout.old_values)[valued]
    np.testing.assert_allclose(
        metrics["critic/explained_variance"], 1 - (returns - old).var() / returns.var(), rtol=1e-4
    )
    assert metrics["logprobs/max_difference"] < 1e-4


def test_figures_do_not_depend_on_how_rows_are_batched(rollout):
    """Sums and weights by hand; 3 and 5 rows add up to the 8 of the whole, one of them empty."""
    whole = ppo.rollout_figures(rollout)
    rows = np.asarray(rollout.tokens.loss_mask).sum(1)
    assert int(whole["response/length"].total) == rows.sum()
    assert int(whole["response/length"].weight) == 7
    assert int(whole["logprobs/mean_difference"].weight) == rows.sum()
    gaps = np.asarray(rollout.old_logprobs - rollout.ref_logprobs)
    np.testing.assert_allclose(whole["objective/kl"].total, gaps.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        whole["objective/non_score_reward"].total, -CONFIG.kl_coef * gaps.sum(), rtol=1e-4
    )
    parts = [
        ppo.rollout_figures(jax.tree.map(lambda x, part=part: x[part], rollout))
        for part in (slice(0, 3), slice(3, 8))
    ]
    summed = jax.tree.map(jnp.add, *parts)
    for name, figure in whole.items():
        np.testing.assert_allclose(summed[name], figure, 1e-5, 1e-5, err_msg=name)
    # All metrics but these are means over rows, which the figures hold.
    alone = {
        "objective/scores_std", "response/length_min", "response/length_max", "val/num_eos_tokens",
        "logprobs/max_difference", "critic/explained_variance",
    }  # fmt: skip
    assert set(ppo.rollout_metrics(rollout)) - set(whole) == alone


def test_experience_lowers_as_it_runs(state, reference, rollout):
    """The program of `lower` for shapes is the one that makes the rollout."""
    tokens = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), rollout.tokens)
    columns = jnp.pad(rollout.sampler_logprobs, ((0, 0), (0, 1)))
    args = (state, reference, tokens, rollout.scores, rollout.finished, columns)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    made = prepare().lower(*shapes).compile()(*args)
    np.testing.assert_allclose(made.returns, rollout.returns, 1e-5, 1e-5)


def test_several_devices_make_the_same_rollout(rollout, state, reference):
    """Policy and critic on four devices, the reference on four others."""
    mesh = make_mesh(data=2, fsdp=1, tensor=2, devices=jax.devices()[:4])
    others = make_mesh(devices=jax.devices()[4:])
    axes = ppo.init_params(tiny.DECODER.axes, tiny.SCORER.axes)
    placed = init_state(jax.device_put(state.params, param_shardings(axes, mesh)), optax.sgd(0.0))
    reference = jax.device_put(reference, param_shardings(tiny.DECODER.axes, others))
    spread = prepare()(KEY, placed, reference, prompts(filled=7))
    for name, one, other in zip(rollout._fields, rollout, spread, strict=True):
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            if a.dtype == jnp.float32:
                np.testing.assert_allclose(b, a, 1e-4, 5e-5, err_msg=name)
            else:
                np.testing.assert_array_equal(b, a, err_msg=name)
    parts = list(ppo.minibatches(KEY, spread, epochs=1, count=2))
    assert all(x.sharding.device_set == set(mesh.devices.flat) for x in jax.tree.leaves(parts))


def test_minibatches_in_an_order_from_outside(rollout):
    numbered = rollout._replace(scores=jnp.arange(8.0))
    orders = np.array([[3, 1, 0, 2, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5, 6, 7]])
    parts = ppo.minibatches(None, numbered, epochs=2, count=2, permutations=orders)
    rows = [np.asarray(part.scores).tolist() for part in parts]
    assert rows == orders.reshape(4, 4).tolist()
    for wrong, message in ((orders[:1], r"permutations \(1, 8\)"), (orders * 0, "numbers from 0")):
        with pytest.raises(ValueError, match=message):
            next(ppo.minibatches(None, numbered, epochs=2, count=2, permutations=wrong))
    with pytest.raises(ValueError, match="key=None without permutations"):
        next(ppo.minibatches(None, numbered))


def test_answers_from_elsewhere_need_no_log_probabilities(state, reference, rollout):
    tokens, width = rollout.tokens, rollout.tokens.inputs.shape[1]
    wide = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), tokens)
    assert wide.inputs.shape[1] == width + 1
    experience = ppo.make_experience(tiny.DECODER, tiny.SCORER, CONFIG)
    own = experience(state, reference, wide, rollout.scores, rollout.finished)
    assert own.sampler_logprobs is None
    np.testing.assert_allclose(own.advantages, rollout.advantages, atol=1e-4)
    got, want = ppo.rollout_metrics(own), ppo.rollout_metrics(rollout)
    assert want.keys() - got.keys() == {"logprobs/mean_difference", "logprobs/max_difference"}
    np.testing.assert_allclose(got["objective/kl"], want["objective/kl"], rtol=1e-4)


def test_the_configured_estimator_is_logged_beside_the_kl(rollout):
    metrics = ppo.rollout_metrics(rollout, 1, "k2")
    gap = np.asarray(rollout.old_logprobs, np.float64) - np.asarray(rollout.ref_logprobs)
    mask, valid = np.asarray(rollout.tokens.loss_mask), np.asarray(rollout.valid)
    want = (gap**2 / 2 * mask).sum() / valid.sum()
    np.testing.assert_allclose(metrics["objective/kl_k2"], want, rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/kl"], (gap * mask).sum() / valid.sum(), rtol=1e-5)


def test_minibatches_use_every_row_once_an_epoch_in_fresh_order(rollout):
    numbered = rollout._replace(scores=jnp.arange(8.0))
    parts = [part.scores for part in ppo.minibatches(KEY, numbered, epochs=3, count=4)]
    assert len(parts) == 12
    assert all(part.shape == (2,) for part in parts)
    epochs = np.asarray(parts).reshape(3, 8)
    np.testing.assert_array_equal(np.sort(epochs), [np.arange(8)] * 3)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = [part.scores for part in ppo.minibatches(KEY, numbered, epochs=3, count=4)]
    np.testing.assert_array_equal(parts, again)
    first = next(ppo.minibatches(KEY, numbered, epochs=1, count=4))
    rows = np.asarray(first.scores, int)
    np.testing.assert_array_equal(first.tokens.inputs, np.asarray(rollout.tokens.inputs)[rows])
    with pytest.raises(ValueError, match=r"8 rollout rows .*count=3"):
        next(ppo.minibatches(KEY, rollout, count=3))
    with pytest.raises(ValueError, match="epochs=0"):
        next(ppo.minibatches(KEY, rollout, epochs=0))


def test_reward_that_fails_stops_the_run(state, reference):
    def broken(tokens, prompts):
        return np.array([0.0, np.nan, 1, 1, 1, np.inf, 1, 1])

    with pytest.raises(ValueError, match=r"nan for row 1 \(2 rows not finite\)"):
        prepare(reward_fn=broken)(KEY, state, reference, prompts())
    with pytest.raises(ValueError, match=r"shape \(3,\).*\(8,\)"):
        prepare(reward_fn=lambda *_: np.zeros(3))(KEY, state, reference, prompts())


def test_reward_of_an_empty_row_is_not_read(state, reference):
    def score(tokens, prompts):
        return np.where(np.asarray(tokens.loss_mask).any(1), 1.0, np.nan)

    rollout = prepare(reward_fn=score)(KEY, state, reference, prompts(filled=7))
    assert np.isfinite(jax.device_get(rollout.scores)).all()


class Offset:
    """A policy whose trainer sees other logits than its sampler: a broken pair of engines."""

    def __init__(self, shift):
        self.shift = shift

    def __getattr__(self, name):
        return getattr(tiny.DECODER, name)

    def head(self, params):
        return params["head"]["kernel"] * (1 + self.shift)


def test_sampler_that_strays_from_the_trainer_stops_the_run(state, reference):
    # The sampler reads `logits` of the decoder, the trainer `head`.
    make = ppo.make_prepare(Offset(0.5), tiny.SCORER, length_reward, CONFIG)
    with pytest.raises(ValueError, match=r"differ by .* wanted at most logprob_tolerance=0.05"):
        make(KEY, state, reference, prompts())


@pytest.mark.parametrize("options", [{}, {"score_at": "after_eos"}, {"kl_in": "loss"}], ids=str)
def test_updates_read_only_the_columns_of_answers(options, state, reference):
    """Loss, gradient and metrics are those of whole rows; so is the rollout itself."""
    config = dataclasses.replace(CONFIG, **options)
    rollout = prepare(config)(KEY, state, reference, prompts(filled=7))
    rows, length = rollout.advantages.shape
    assert rollout.columns.shape == (rows, config.max_new_tokens + 1)
    assert config.max_new_tokens + 1 < length
    loss = ppo.make_loss(tiny.DECODER, tiny.SCORER, config)

    @jax.jit
    def run(params, batch):
        def total(params):
            sums, metrics = loss.terms(params, batch)
            return sum(sums.values()), metrics

        return jax.value_and_grad(total, has_aux=True)(params)

    moved = jax.tree.map(lambda x: 1.02 * x, state.params)
    (got, metrics), gradient = run(moved, rollout)
    (want, wanted), whole = run(moved, rollout._replace(columns=None))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for name, figure in wanted.items():
        np.testing.assert_allclose(metrics[name].total, figure.total, 1e-4, 1e-5, err_msg=name)
        assert metrics[name].weight == figure.weight
    for have, value in zip(jax.tree.leaves(gradient), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(have, value, atol=1e-5 * float(jnp.abs(value).max()) + 1e-7)


def test_longer_answers_of_other_origin_are_read_whole(state, reference, rollout):
    """A config that says less than the answers hold: nothing of them is left out."""
    shorter = dataclasses.replace(CONFIG, max_new_tokens=2)
    tokens = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 1))), rollout.tokens)
    for config, columns in ((CONFIG, True), (shorter, False)):
        make = ppo.make_experience(tiny.DECODER, tiny.SCORER, config)
        got = make(state, reference, tokens, rollout.scores, rollout.finished)
        assert (got.columns is not None) == columns
        np.testing.assert_allclose(got.old_logprobs, rollout.old_logprobs, atol=1e-5)
        mask = np.asarray(got.value_mask)
        np.testing.assert_allclose(
            got.old_values[mask], np.asarray(rollout.old_values)[mask], atol=1e-5
        )


@pytest.mark.parametrize(
    ("mask", "count", "columns", "holds"),
    [
        ([0, 1, 1, 1, 0, 0], 4, [1, 2, 3, 4], True),
        ([0, 1, 1, 1, 0, 0], 3, [1, 2, 3], False),  # the critic may be trained one column after
        ([0, 0, 0, 1, 1, 1], 3, [3, 4, 5], True),  # there is none
        ([0, 0, 0, 0, 1, 0], 3, [3, 4, 5], True),
        ([0, 0, 0, 0, 0, 0], 2, [0, 1], True),
    ],
)
def test_columns_of_answers_by_hand(mask, count, columns, holds):
    from jaxalign.algorithms.ppo.rows import answer_columns

    got, all_held = answer_columns(np.array([mask], bool), count)
    np.testing.assert_array_equal(got[0], columns)
    assert bool(all_held) == holds


def test_adaptive_kl():
    config = ppo.Config(kl_target=6.0, kl_horizon=1000.0)
    # error clip(12/6 − 1) = 0.2; 1 + 0.2 · 250/1000 = 1.05
    np.testing.assert_allclose(ppo.next_kl_coef(0.1, 12.0, config, rows=250), 0.105, rtol=1e-6)
    np.testing.assert_allclose(ppo.next_kl_coef(0.1, 5.4, config, rows=250), 0.0975, rtol=1e-6)
    assert ppo.next_kl_coef(0.1, 12.0, ppo.Config(), rows=250) == 0.1


def test_join_tokens_by_hand():
    from jaxalign.sampling.generate import Generation

    prompt = PromptBatch(np.array([[0, 7, 8]]), np.array([[False, True, True]]), np.array([0]))
    answer = Generation(
        jnp.array([[4, 5, 1]]),
        jnp.zeros((1, 3)),
        jnp.array([[True, True, False]]),
        jnp.array([True]),
    )
    rows = ppo.join_tokens(prompt, answer, pad_token=1)
    want = {
        "inputs": [0, 7, 8, 4, 5, 1],
        "targets": [7, 8, 4, 5, 1, 1],
        "positions": [0, 0, 1, 2, 3, 3],
        "segment_ids": [0, 1, 1, 1, 1, 0],
        "loss_mask": [False, False, True, True, False, False],
    }
    for name, value in want.items():
        np.testing.assert_array_equal(getattr(rows, name)[0], value, err_msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"kl_in": "nowhere"},
        {"kl_target": 0.0},
        {"kl_target": 6.0, "kl_in": "loss"},
        {"gamma": 1.5},
        {"score_at": "end"},
        {"kl_estimator": "k4"},
        {"clip_range": 0.0},
        {"missing_eos_penalty": -1.0},
        {"whiten_ddof": 2},
        {"top_p": 0.0},
        {"max_new_tokens": 0},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_out_of_range_are_refused(options):
    name = next(iter(options))
    with pytest.raises(ValueError, match=f"{name.removeprefix('kl_')}="):
        ppo.Config(**options)


def test_penalty_without_stop_tokens_is_refused():
    with pytest.raises(ValueError, match=r"missing_eos_penalty=1\.0 .*stop_tokens"):
        prepare(ppo.Config(missing_eos_penalty=1.0))
