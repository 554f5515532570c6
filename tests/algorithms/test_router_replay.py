"""Router replay: the trainer's passes take the experts that the sampler took."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.state import init_state
from jaxalign.models.decoder import Decoder
from jaxalign.models.lm_head import target_logprobs
from jaxalign.models.scorer import Scorer
from jaxalign.sampling.generate import sample
from jaxalign.types import PromptBatch

ROWS, PROMPT, NEW, LAYERS, TAKEN = 8, 6, 10, 2, 2
CONFIG = dataclasses.replace(
    tiny.CONFIG, num_layers=LAYERS, num_experts=8, experts_per_token=TAKEN, router_aux_coef=0.1,
    family="mixtral",
)  # fmt: skip
MODEL = Decoder(CONFIG)
GROUPS = {"advantage_estimator": "grpo", "samples": 2, "max_new_tokens": NEW}


@pytest.fixture(scope="module")
def params():
    """Experts come in pairs that the router rates alike but for 1e-3, and that differ in all else:
    which of a pair a token takes is a matter of rounding."""
    params = tiny.random_params(MODEL, seed=1)
    kernel = params["blocks"]["mlp"]["router"]["kernel"]
    noise = jax.random.normal(jax.random.key(5), kernel.shape)
    paired = jnp.repeat(kernel[..., ::2], 2, axis=-1) + 1e-3 * noise
    params["blocks"]["mlp"]["router"]["kernel"] = paired
    return params


def prompts(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(PROMPT)[None] >= PROMPT - rng.integers(1, PROMPT + 1, (ROWS, 1))
    tokens = np.where(mask, rng.integers(12, tiny.VOCAB, mask.shape), 0).astype(np.int32)
    return PromptBatch(tokens, mask, np.arange(ROWS, dtype=np.int32))


def reward(tokens, prompts):
    return np.asarray(tokens.inputs).sum(1).astype(np.float32) % 7


def chosen_experts(params, tokens):
    """What the trainer's routers choose in whole rows, sorted: `[B, T, L, k]`."""
    found = []

    def run(layer, x, inputs_of, kind):
        (x, routing), _ = MODEL._block(layer).with_keys_values(x, inputs_of({}), kind)
        found.append(routing.experts)
        return x

    from jaxalign.models.attention.mask import Segments

    segments = Segments(tokens.segment_ids, tokens.positions)
    rows = MODEL._rows(tokens.inputs, segments, balance=False)
    x = MODEL._embed(params, rows.inputs, tokens.positions, tokens.segment_ids, "rows new hidden")
    for number in range(LAYERS):
        layer = jax.tree.map(lambda w, number=number: w[number], params["blocks"])
        x = run(layer, x, rows.of_layer, rows.kind)
    return np.sort(np.stack(found, axis=2), axis=-1)


@pytest.mark.parametrize("slots", [None, 3], ids=["all", "queue"])
def test_the_sampler_keeps_what_its_routers_chose(params, slots):
    """In float32 these are the trainer's choices too, whichever slot an answer was in."""
    out = sample(
        MODEL, params, prompts(), jax.random.key(1), max_new_tokens=NEW, samples=2, slots=slots,
        lengths=np.arange(2 * ROWS) % NEW + 1, keep_experts=True,
    )  # fmt: skip
    assert out.experts.shape == (2 * ROWS, PROMPT + NEW, LAYERS, TAKEN)
    assert out.experts.dtype == jnp.uint8
    repeated = jax.tree.map(lambda x: np.repeat(x, 2, axis=0), prompts())
    tokens = ppo.join_tokens(repeated, out)
    real = np.asarray(tokens.segment_ids) > 0
    got = np.sort(np.asarray(out.experts), axis=-1)[real]
    want = chosen_experts(params, tokens)[real]
    assert (got == want).mean() > 0.999  # a tie may turn in float32 too
    assert len(np.unique(got)) == CONFIG.num_experts


def rollout(params, *, replay, base=MODEL, dtype="bfloat16", **options):
    model = dataclasses.replace(base, compute_dtype=dtype)
    config = ppo.Config(**(GROUPS | options), router_replay=replay, logprob_tolerance=10.0)
    state = init_state({"policy": params}, optax.sgd(1e-2))
    prepare = ppo.make_prepare(model, None, reward, config)
    return model, config, state, prepare(jax.random.key(2), state, params, prompts())


def test_the_log_prob_contract_is_tighter_with_replay():
    """In bfloat16, with routers prone to ties: of 16 experts two are taken, and the second is at
    times as likely as the third to rounding."""
    many = Decoder(dataclasses.replace(CONFIG, num_experts=16, num_layers=3))
    own = tiny.random_params(many, seed=1)
    differences = {}
    for replay in (False, True):
        *_, made = rollout(own, replay=replay, base=many, max_new_tokens=24)
        metrics = ppo.rollout_metrics(made, 2)
        differences[replay] = [
            float(metrics[f"logprobs/{name}_difference"]) for name in ("mean", "max")
        ]
    assert differences[False][0] > 1.3 * differences[True][0], differences
    assert differences[False][1] > 5 * differences[True][1], differences


def test_updates_replay_too(params):
    """Before the first update the ratio is 1 in every token, in rows that are packed or not; with
    other experts it would not be."""
    model, config, state, made = rollout(params, replay=True, dtype="float32")
    assert made.tokens.experts.shape == (2 * ROWS, PROMPT + NEW - 1, LAYERS, TAKEN)
    step = jax.jit(ppo.make_step(model, None, optax.sgd(0.0), config))
    (whole,) = ppo.minibatches(jax.random.key(0), made, 1, 1)
    (packed,) = ppo.minibatches(jax.random.key(0), made, 1, 1, pack=4)
    state, want = step(state, whole)
    _, got = step(state, packed)
    for name in ("loss", "loss/policy_avg", "policy/entropy_avg", "grad_norm", "router"):
        np.testing.assert_allclose(got[name], want[name], 2e-5, 1e-6, err_msg=name)
    assert float(want["policy/approxkl_avg"]) < 1e-9
    others = (whole.tokens.experts + 1) % CONFIG.num_experts
    moved = whole._replace(tokens=whole.tokens._replace(experts=others))
    assert float(step(state, moved)[1]["policy/approxkl_avg"]) > 1e-3


def test_gradients_reach_the_router_through_the_replayed_weights(params):
    rng = np.random.default_rng(0)
    ids = rng.integers(3, tiny.VOCAB, (2, 7))
    experts = rng.integers(0, CONFIG.num_experts, (2, 7, LAYERS, TAKEN)).astype(np.uint8)

    def loss(params, experts):
        hidden = MODEL.apply(params, ids, experts=experts)
        return jnp.sum(target_logprobs(MODEL, params, hidden, ids))

    gradient = jax.jit(jax.grad(loss))(params, experts)["blocks"]["mlp"]
    assert float(jnp.abs(gradient["router"]["kernel"]).max()) > 1e-3
    unused = np.setdiff1d(np.arange(CONFIG.num_experts), experts[:, :, 0])
    used = np.abs(np.asarray(gradient["down"]["kernel"][0])).max((1, 2)) > 0
    assert not used[unused].any()
    assert used.sum() == CONFIG.num_experts - len(unused)


def test_a_critic_of_its_own_keeps_its_own_routers(params):
    scorer = Scorer(MODEL)
    config = ppo.Config(max_new_tokens=NEW, router_replay=True)
    both = ppo.init_params(params, tiny.random_params(scorer, 4))
    state = init_state(both, optax.sgd(0.0))
    prepare = ppo.make_prepare(MODEL, scorer, reward, config)
    made = prepare(jax.random.key(2), state, params, prompts())
    step = jax.jit(ppo.make_step(MODEL, scorer, optax.sgd(0.0), config))
    others = made.tokens._replace(experts=(made.tokens.experts + 1) % CONFIG.num_experts)
    got, other = (step(state, x)[1] for x in (made, made._replace(tokens=others)))
    assert got["loss/value_avg"] == other["loss/value_avg"]
    assert got["critic_router"] == other["critic_router"]
    assert got["loss/policy_avg"] != other["loss/policy_avg"]


def test_a_policy_without_experts_is_refused():
    config = ppo.Config(router_replay=True, **GROUPS)
    with pytest.raises(ValueError, match="router_replay=True: the policy is no mixture"):
        ppo.make_prepare(tiny.DECODER, None, reward, config)
    with pytest.raises(ValueError, match="keep_experts=True: the model is no mixture"):
        sample(
            tiny.DECODER, tiny.random_params(tiny.DECODER), prompts(), jax.random.key(0),
            max_new_tokens=2, keep_experts=True,
        )  # fmt: skip
