"""What DPO and KTO make of a model's log-probabilities, against numpy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
import yaml

from jaxalign.algorithms import dpo, kto
from jaxalign.algorithms.pairs import layout, read_answers
from jaxalign.algorithms.state import init_state
from jaxalign.losses import preference
from jaxalign.models.decoder import Decoder
from jaxalign.run.config.yaml import build, to_values
from jaxalign.types import PairBatch, SharedPairBatch, UnpairedBatch

LENGTHS = ((9, 6), (5, 11), (8, 8))
PROMPTS = (3, 4, 1)
REF = np.array([[-30.0, -12.0, -40.0], [-20.0, -33.0, -31.0]], np.float32)


@pytest.fixture(scope="module")
def params():
    return tiny.random_params(tiny.DECODER, seed=1)


@pytest.fixture(scope="module")
def sides():
    rng = np.random.default_rng(4)
    return [
        [tiny.document(rng, n[side], p) for n, p in zip(LENGTHS, PROMPTS, strict=True)]
        for side in (0, 1)
    ]


def lay(documents, length=12):
    groups = tiny.alone(len(documents), 4)  # and an empty row
    return tiny.token_batch(tiny.lay(documents, groups, length))


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def token_logprobs(params, document):
    """(log π of each trained target, log Σ p² there) in float64."""
    ids = document["inputs"][None]
    hidden = tiny.DECODER.apply(params, ids)
    logits = np.asarray(tiny.DECODER.logits(params, hidden), np.float64)[0]
    logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    trained = np.flatnonzero(document["loss_mask"])
    own = logp[trained, document["targets"][trained]]
    return own, np.log(np.exp(2 * logp[trained]).sum(axis=-1))


def test_every_option_of_dpo_against_numpy(params, sides):
    config = dpo.Config(
        beta=0.2,
        loss_type=("sigmoid", "hinge"),
        loss_weights=(1.0, 0.5),
        label_smoothing=0.1,
        f_divergence="forward_kl",
        ld_alpha=0.3,
        wpo_weighting=True,
        sft_coef=0.7,
    )
    losses, rewards, nll, count, weights = [], [], 0.0, 0, []
    for pair in range(3):
        (c, c2), (r, r2) = (token_logprobs(params, side[pair]) for side in sides)
        shared = min(len(c), len(r))
        tail = [np.where(np.arange(len(x)) < shared, 1, 0.3) @ x for x in (c, r)]
        ratios = tail[0] - REF[0, pair], tail[1] - REF[1, pair]
        gap = 0.2 * ((1 - np.exp(-ratios[0])) - (1 - np.exp(-ratios[1])))
        weight = np.exp((c - c2).mean()) * np.exp((r - r2).mean())
        straight, flipped = np.logaddexp(0, -gap), np.logaddexp(0, gap)
        losses.append(weight * (0.9 * straight + 0.1 * flipped + 0.5 * max(0, 1 - gap)))
        rewards.append((0.2 * ratios[0], 0.2 * ratios[1]))
        weights.append(weight)
        nll, count = nll - c.sum(), count + len(c)

    none = np.zeros((2, 1), np.float32)
    refs = np.append(REF, none, axis=1)
    batch = PairBatch(lay(sides[0]), lay(sides[1]), refs[0], refs[1])
    loss = dpo.make_loss(tiny.DECODER, config)
    counts = loss.count(batch)
    assert counts == {"preference": 3, "sft": count}
    sums, metrics = jax.jit(loss.terms)(params, batch)
    assert sums["preference"] == pytest.approx(sum(losses), rel=1e-4)
    assert sums["sft"] == pytest.approx(0.7 * nll, rel=1e-4)
    means = {name: float(metric.mean()) for name, metric in metrics.items()}
    chosen, rejected = np.transpose(rewards)
    assert means["rewards/chosen"] == pytest.approx(chosen.mean(), rel=1e-4)
    assert means["rewards/margins"] == pytest.approx((chosen - rejected).mean(), rel=1e-4)
    assert means["rewards/accuracies"] == pytest.approx((chosen > rejected).mean())
    assert means["nll"] == pytest.approx(nll / count, rel=1e-4)
    assert means["weights"] == pytest.approx(np.mean(weights), rel=1e-4)


def test_a_loss_from_outside_trains_by_its_options(params, sides, monkeypatch):
    """Registered in one call; its option comes from the config, which YAML can hold."""
    monkeypatch.setattr(preference, "TABLE", dict(preference.TABLE))

    def hinge_from(chosen, rejected, *, beta, hinge_at):
        return jax.nn.relu(hinge_at - beta * (chosen - rejected))

    preference.register("hinge_from", hinge_from, {"hinge_at": preference.Option(1.0)})
    config = dpo.Config(loss_type="hinge_from", loss_options={"hinge_at": 4.0}, beta=0.2)
    batch = PairBatch(lay(sides[0]), lay(sides[1]), *np.append(REF, [[0], [0]], 1).astype("f4"))
    step = jax.jit(dpo.make_step(tiny.DECODER, tiny_sgd(), config))
    _, metrics = step(init_state(params, tiny_sgd()), batch)
    losses = []
    for pair in range(3):
        c, r = (token_logprobs(params, side[pair])[0].sum() for side in sides)
        losses.append(max(0, 4 - 0.2 * ((c - REF[0, pair]) - (r - REF[1, pair]))))
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    # A config is data: hashable, equal by value, written and read as YAML.
    values = yaml.safe_load(yaml.safe_dump(to_values(config)))
    assert values["loss_options"] == {"hinge_at": 4.0}
    assert build(dpo.Config, values) == config
    assert hash(build(dpo.Config, values)) == hash(config)
    assert dpo.Config(loss_type="hinge_from") != config
    with pytest.raises(ValueError, match=r"hinge_to=1.0: no preference loss has this option"):
        dpo.Config(loss_type="hinge_from", loss_options={"hinge_to": 1.0})
    with pytest.raises(ValueError, match=r"loss_options simpo_gamma=0.3.*set simpo_gamma itself"):
        dpo.Config(loss_type="simpo", loss_options={"simpo_gamma": 0.3})
    with pytest.raises(ValueError, match=r"hinge_at=4.0 has no effect on loss_type='sigmoid'"):
        dpo.Config(loss_options={"hinge_at": 4.0})


def test_the_reference_counts_tails_as_the_policy_does(params, sides):
    batch = PairBatch(lay(sides[0]), lay(sides[1]))
    config = dpo.Config(ld_alpha=0.3)
    ready = dpo.make_prepare(tiny.DECODER, config)(params, batch)
    c, r = (token_logprobs(params, side[0])[0] for side in sides)
    shared = min(len(c), len(r))
    want = c[:shared].sum() + 0.3 * c[shared:].sum()
    assert ready.ref_chosen_logps[0] == pytest.approx(want, rel=1e-5)
    _, metrics = jax.jit(dpo.make_loss(tiny.DECODER, config).terms)(params, ready)
    assert metrics["rewards/chosen"].total == pytest.approx(0, abs=1e-4)
    # What is lowered for shapes is what runs, `ld_alpha` included.
    lowered = dpo.make_prepare(tiny.DECODER, config).lower(*shapes_of((params, batch)))
    chosen, _ = lowered.compile()(params, batch)
    assert chosen[0] == pytest.approx(want, rel=1e-5)


def test_published_sft_terms_and_refusals():
    assert dpo.Config(loss_type="orpo").sft_weight == 1
    assert dpo.Config(loss_type="cpo", sft_coef=0.0).sft_weight == 0
    assert dpo.Config(loss_type="simpo").sft_weight == 0
    both = dpo.Config(loss_type=["sigmoid", "sft"], loss_weights=(1.0, 0.2))
    assert both.sft_weight == 0.2
    assert both.loss_type == ("sigmoid", "sft")
    with pytest.raises(ValueError, match="has no reference; nothing to prepare"):
        dpo.make_prepare(tiny.DECODER, dpo.Config(loss_type="simpo"))
    with pytest.raises(ValueError, match="micro_batches=2 with loss_type='aot'"):
        dpo.make_step(tiny.DECODER, None, dpo.Config(loss_type="aot"), micro_batches=2)


def test_a_shared_batch_wants_branches_and_a_mask(sides):
    tokens = lay(sides[0])
    with pytest.raises(ValueError, match="no branch_ids"):
        layout(SharedPairBatch(tokens, mask=np.ones((4, 1), bool)))
    with pytest.raises(ValueError, match="mask is None"):
        layout(SharedPairBatch(tokens._replace(branch_ids=tokens.inputs)))


def test_kto_prepares_a_batch_with_what_all_of_it_says(params, sides):
    """s, z and the loss in numpy; the last row's mismatched answer does not exist."""
    reference = tiny.random_params(tiny.DECODER, seed=2)
    own, other = sides
    mismatched = lay(other)
    mismatched = mismatched._replace(
        loss_mask=np.where(np.arange(4)[:, None] == 2, False, mismatched.loss_mask)
    )
    desirable = np.array([True, False, True, False])
    batch = UnpairedBatch(lay(own), desirable, mismatched)
    state = init_state(params, tiny_sgd())
    prepare = kto.make_prepare(tiny.DECODER)
    ready = prepare(state, reference, batch)
    lowered = prepare.lower(*shapes_of((state, reference, batch)))
    np.testing.assert_array_equal(lowered.compile()(params, reference, batch)[1], ready.kl)

    def ratio(document):
        one, two = (token_logprobs(p, document)[0].sum() for p in (params, reference))
        return one - two, two

    z = max(0.0, np.mean([ratio(document)[0] for document in other[:2]]))
    np.testing.assert_allclose(ready.kl, np.full(4, z), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ready.ref_logps[:3], [ratio(d)[1] for d in own], rtol=1e-5)

    config = kto.Config(beta=0.3, desirable_weight=1.5)
    loss = kto.make_loss(tiny.DECODER, config)
    assert loss.count(batch) == {"kto": 3}
    sums, metrics = jax.jit(loss.terms)(params, ready)
    s = np.array([ratio(d)[0] for d in own])
    value = 1 / (1 + np.exp(-0.3 * np.where(desirable[:3], s - z, z - s)))
    want = np.where(desirable[:3], 1.5, 1.0) * (1 - value)
    assert sums["kto"] == pytest.approx(want.sum(), rel=1e-4)
    assert metrics["rewards/chosen"].mean() == pytest.approx(0.3 * s[[0, 2]].mean(), rel=1e-4)
    assert metrics["rewards/rejected"].mean() == pytest.approx(0.3 * s[1], rel=1e-4)
    assert metrics["kl"].mean() == pytest.approx(z, rel=1e-4, abs=1e-6)
    with pytest.raises(ValueError, match="no ref_logps / kl"):
        loss.terms(params, batch)


def tiny_sgd():
    import optax

    return optax.sgd(0.1)


def test_a_mixture_of_experts_brings_its_own_term(sides):
    config = dataclasses.replace(
        tiny.CONFIG, num_experts=4, experts_per_token=2, router_aux_coef=0.01
    )
    model = Decoder(config)
    weights = tiny.random_params(model, seed=1)
    refs = np.zeros(4, np.float32)
    pairs = PairBatch(lay(sides[0]), lay(sides[1]), refs, refs)
    single = UnpairedBatch(lay(sides[0]), refs > 0, lay(sides[1]), refs, refs)
    real = sum(n for pair in LENGTHS for n in pair)
    for loss, batch, tokens in (
        (dpo.make_loss(model), pairs, real),
        (kto.make_loss(model), single, sum(n for n, _ in LENGTHS)),
    ):
        assert loss.count(batch)["router"] == tokens
        sums, metrics = jax.eval_shape(loss.terms, weights, batch)
        assert "router" in sums
        assert "router" in metrics


def test_an_answer_model_needs_only_apply_and_head(params, sides):
    """A model of one's own, without branches or further terms."""

    class Mine:
        def apply(self, params, inputs, positions=None, segment_ids=None):
            return tiny.DECODER.apply(params, inputs, positions, segment_ids)

        def head(self, params):
            return tiny.DECODER.head(params)

    batch = PairBatch(lay(sides[0]), lay(sides[1]))
    answers = read_answers(Mine(), params, batch)
    np.testing.assert_allclose(
        answers.chosen[0], token_logprobs(params, sides[0][0])[0].sum(), rtol=1e-5
    )
    np.testing.assert_array_equal(answers.chosen_lengths, [6, 1, 7, 0])
