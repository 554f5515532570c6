"""`ppo.keep_lower_states`: layers below all adapters run once a rollout; no result changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.compile import compile_step
from jaxalign.algorithms.state import init_state
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, add_lora, make_adapters
from jaxalign.models.lower_states import same_lower_layers
from jaxalign.models.scorer import Scorer
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, shard_batch
from jaxalign.types import TokenBatch

PROMPT, ANSWER, SAMPLES, ROWS = 6, 10, 2, 16
BASE = Decoder(dataclasses.replace(tiny.CONFIG, num_layers=4))
UPPER = LoraConfig(rank=2, alpha=4.0, targets=(r"layers\.[23]\..*",))
TX = optax.sgd(0.5)


def answers():
    """Ragged prompts, each twice, with ragged answers, as `join_tokens` lays them."""
    rng = np.random.default_rng(0)
    shape = (ROWS, PROMPT + ANSWER)
    first, column = np.arange(ROWS) // SAMPLES * SAMPLES, np.arange(shape[1])[None]
    prompts = rng.integers(1, PROMPT + 1, (ROWS, 1))[first]
    there = (column >= PROMPT - prompts) & (column < PROMPT + rng.integers(1, 7, (ROWS, 1)))
    ids = rng.integers(3, tiny.VOCAB, shape)
    ids = np.where(there, np.where(column < PROMPT, ids[first], ids), 0).astype(np.int32)
    mask = np.roll(there & (column >= PROMPT), -1, axis=1)
    positions = np.maximum(np.cumsum(there, 1) - 1, 0).astype(np.int32)
    return TokenBatch(ids, np.roll(ids, -1, 1), positions, there.astype(np.int32), mask)


def models():
    """Policy, its trained and frozen parameters; and the same of a critic on the same base."""
    policy, adapters, frozen = add_lora(BASE, tiny.random_params(BASE), jax.random.key(0), UPPER)
    critic_adapters, _ = make_adapters(BASE, frozen, jax.random.key(1), UPPER)
    head = tiny.random_params(Scorer(BASE), 3)["score"]
    trunk = {name: value for name, value in frozen.items() if name != "head"}
    critic = Scorer(dataclasses.replace(BASE, lora=UPPER))
    trained = ppo.init_params(adapters, critic_adapters | {"score": head})
    return policy, critic, trained, {"policy": frozen, "critic": trunk}


def iteration(keep, *, mesh=None, pack=0, **options):
    """A rollout, the parameters after its updates, and the metrics of the first update."""
    policy, critic, trained, frozen = models()
    config = ppo.Config(samples=SAMPLES, keep_lower_states=keep, pack_experience=pack, **options)
    scores = np.random.default_rng(1).normal(1.0, 1.0, ROWS).astype(np.float32)
    batch = answers(), scores, np.ones(ROWS, bool)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else make_mesh(**mesh)
    axes = ppo.init_params(policy.axes, critic.axes)
    layouts = param_shardings(axes, mesh, ppo.init_params(policy.shapes, critic.shapes))

    def put(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jax.device_put(x, leaf(layouts, path)), params
        )

    frozen = put({"policy": frozen["policy"]})
    frozen["critic"] = {name: x for name, x in frozen["policy"].items() if name != "head"}
    state = init_state(put(trained), ppo.make_optimizer(TX, TX), frozen)
    reference = state.frozen["policy"]
    with jax.set_mesh(mesh):
        experience = ppo.make_experience(policy, critic, config, reference=BASE)
        rollout = experience(state, reference, *shard_batch(batch, mesh))
    step = compile_step(
        ppo.make_step(policy, critic, ppo.make_optimizer(TX, TX), config), state, mesh
    )
    metrics = None
    shared = SAMPLES if config.shared_prompts else 1
    for update in ppo.minibatches(jax.random.key(0), rollout, 2, 2, pack=pack, samples=shared):
        state, logged = step(state, update)
        metrics = logged if metrics is None else metrics
    return rollout, jax.device_get(state.params), jax.device_get(metrics)


def leaf(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.fixture(scope="module")
def plain():
    return iteration(keep=False)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pack": 16},
        {"pack": 16, "shared_prompts": True},
        {"mesh": {"data": 2, "fsdp": 2, "sequence": 2}},
    ],
    ids=["rows", "packed", "shared prompts", "on a mesh"],
)
def test_rollout_and_updates_are_those_of_whole_passes(plain, options):
    want, trained, _ = plain
    got, kept, metrics = iteration(keep=True, **options)
    assert got.tokens.lower.layers == got.critic_lower.layers == 2
    assert got.critic_lower.hidden is None  # the policy's: both have one base
    assert want.tokens.lower is want.critic_lower is None
    for name in ("old_logprobs", "ref_logprobs", "advantages", "returns", "old_values"):
        mask = np.asarray(want.tokens.loss_mask)
        a, b = (np.asarray(getattr(x, name))[mask] for x in (got, want))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=name)
    # The updates moved the weights, and by the same amounts.
    start = jax.device_get(models()[2])
    moved = [jax.tree.map(np.subtract, x, start) for x in (kept, trained)]
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[1])) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *moved)
    assert metrics["val/ratio"] == pytest.approx(1, abs=1e-6)


def test_the_first_ratio_is_one_and_the_first_kl_zero():
    """Policy and reference read the same arrays, in experience and in the update."""
    rollout, _, metrics = iteration(keep=True)
    np.testing.assert_array_equal(rollout.old_logprobs, rollout.ref_logprobs)
    # A mini-batch has other rows than the rollout: products round in another order.
    assert metrics["policy/approxkl_avg"] < 1e-12


def products(lowered):
    """Matrix products of the compiled program; the lowered one calls some functions repeatedly."""
    return lowered.compile().as_text().count(" dot(")


def test_layers_below_are_left_out_of_the_passes():
    policy, critic, trained, frozen = models()
    tokens = answers()
    state = init_state(trained, ppo.make_optimizer(TX, TX), frozen)
    own = state.frozen["policy"]
    other = jax.tree.map(jnp.copy, own)
    found = {}
    for keep, reference in ((False, own), (True, own), (True, other)):
        config = ppo.Config(keep_lower_states=keep)
        experience = ppo.make_experience(policy, critic, config, reference=BASE)
        args = tokens, np.zeros(ROWS, np.float32), np.ones(ROWS, bool)
        lowered = experience.lower(state, reference, *args)
        found[keep, reference is other] = products(lowered)
    # Two layers of nine products: not for the critic, nor for a reference of the policy's arrays.
    assert found[False, False] - found[True, False] == 2 * 2 * 9
    assert found[False, False] - found[True, True] == 2 * 9

    rollout = ppo.make_experience(policy, critic, config, reference=BASE)(state, other, *args)
    step = jax.jit(ppo.make_step(policy, critic, ppo.make_optimizer(TX, TX), config))
    bare = rollout._replace(tokens=rollout.tokens._replace(lower=None), critic_lower=None)
    fewer, all_layers = (products(step.lower(state, batch)) for batch in (rollout, bare))
    assert all_layers - fewer == 2 * 2 * 9  # policy and critic


@pytest.mark.parametrize(
    ("reference", "shares"),
    [
        (BASE, True),
        (dataclasses.replace(BASE, remat="block"), True),
        (dataclasses.replace(BASE, compute_dtype="bfloat16"), False),
        (dataclasses.replace(BASE, config=dataclasses.replace(BASE.config, norm_eps=0.1)), False),
        (object(), False),
    ],
)
def test_only_the_same_model_shares(reference, shares):
    policy, _, trained, frozen = models()
    params = combine(trained["policy"], frozen["policy"])
    assert same_lower_layers(policy, params, reference, frozen["policy"]) == shares
    copied = jax.tree.map(jnp.copy, frozen["policy"])
    assert not same_lower_layers(policy, params, reference, copied)


def test_another_critics_states_are_its_own():
    policy, critic, trained, frozen = models()
    frozen["critic"] = jax.tree.map(lambda x: x + 0.01, frozen["critic"])
    state = init_state(trained, ppo.make_optimizer(TX, TX), frozen)
    args = answers(), np.ones(ROWS, np.float32), np.ones(ROWS, bool)
    found = []
    for keep in (False, True):
        config = ppo.Config(keep_lower_states=keep)
        experience = ppo.make_experience(policy, critic, config, reference=BASE)
        found.append(experience(state, state.frozen["policy"], *args))
    kept = found[1]
    assert not np.allclose(kept.critic_lower.hidden, kept.tokens.lower.hidden, atol=1e-3)
    np.testing.assert_allclose(kept.old_values, found[0].old_values, rtol=1e-4, atol=1e-4)


def test_a_critic_on_the_policys_hidden_states_has_none_of_its_own():
    policy, critic, trained, frozen = models()
    params = ppo.init_params(trained["policy"], {"score": trained["critic"]["score"]})
    state = init_state(params, ppo.make_optimizer(TX, TX), {"policy": frozen["policy"]})
    args = answers(), np.arange(ROWS, dtype=np.float32), np.ones(ROWS, bool)
    found = []
    for keep in (False, True):
        config = ppo.Config(keep_lower_states=keep, shared_critic=True)
        experience = ppo.make_experience(policy, critic, config, reference=BASE)
        found.append(experience(state, state.frozen["policy"], *args))
    whole, kept = found
    assert kept.critic_lower is None
    assert kept.tokens.lower.layers == 2
    np.testing.assert_allclose(kept.old_values, whole.old_values, rtol=1e-4, atol=1e-4)


def test_a_base_that_is_trained_is_refused():
    policy, critic, trained, frozen = models()
    for part in ("policy", "critic"):
        whole = trained | {part: combine(trained[part], frozen[part])}
        state = init_state(whole, ppo.make_optimizer(TX, TX), frozen | {part: {}})
        config = ppo.Config(keep_lower_states=True)
        experience = ppo.make_experience(policy, critic, config, reference=BASE)
        with pytest.raises(ValueError, match=rf"state.params\['{part}'\] holds embed or blocks"):
            experience(state, frozen["policy"], answers(), np.ones(ROWS), np.ones(ROWS, bool))


def test_a_policy_that_trains_every_layer_is_refused():
    config = ppo.Config(keep_lower_states=True)
    with pytest.raises(ValueError, match="keep_lower_states=True: training changes every layer"):
        ppo.make_experience(BASE, tiny.SCORER, config)
