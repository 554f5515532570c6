"""Packed rollouts: the same answers in fewer rows, the same loss and gradient, few shapes."""

import jax
import numpy as np
import optax
import pytest
import tiny

from jaxalign.algorithms import ppo
from jaxalign.algorithms.ppo.packing import packed_shape, plan_rows, unpack
from jaxalign.algorithms.state import init_state
from jaxalign.parallel.mesh import make_mesh
from jaxalign.parallel.sharding import param_shardings, shard_batch
from jaxalign.types import RolloutBatch, TokenBatch

KEY = jax.random.key(2)
PROMPT, ANSWER = 6, 12


def short_answers(prompts=(6, 3, 5, 1, 4, 2, 0, 6), answers=(5, 12, 1, 3, 4, 2, 0, 7), fill=0.0):
    """A rollout as `prepare` lays it: prompts end, and answers begin, in one column.

    What stands outside the answers is `fill`.
    """
    rng = np.random.default_rng(0)
    prompts, answers = (np.array(x)[:, None] for x in (prompts, answers))
    column = np.arange(PROMPT + ANSWER)[None]
    there = (column >= PROMPT - prompts) & (column < PROMPT + answers)
    ids = np.where(there, rng.integers(3, tiny.VOCAB, there.shape), 0).astype(np.int32)
    # One column less: the last one predicts nothing.
    there, ids, column = there[:, :-1], np.append(ids, np.zeros_like(ids[:, :1]), 1), column[:, :-1]
    mask = (column >= PROMPT - 1) & (column < PROMPT - 1 + answers)

    def noise(scale, where):
        x = rng.normal(0, scale, mask.shape).astype(np.float32)
        return np.where(where, x, np.float32(fill))

    # The critic also learns the position after the stop token, where the row has one.
    value_mask = mask | ((column == PROMPT - 1 + answers) & (answers > 0))
    tokens = TokenBatch(
        inputs=ids[:, :-2],
        targets=ids[:, 1:-1],
        positions=np.maximum(np.cumsum(there, 1) - 1, 0).astype(np.int32),
        segment_ids=there.astype(np.int32),
        loss_mask=mask,
    )
    return RolloutBatch(
        tokens=tokens,
        old_logprobs=noise(0.3, mask) - 4,
        ref_logprobs=noise(0.3, mask) - 4,
        old_values=noise(0.5, value_mask),
        advantages=noise(1, mask),
        returns=noise(1, value_mask),
        value_mask=value_mask,
        rewards=noise(1, value_mask),
        scores=rng.normal(size=len(mask)).astype(np.float32),
        sampler_logprobs=noise(0.1, mask),
        finished=np.ones(len(mask), bool),
        valid=mask.any(1),
    )


def test_layout_by_hand():
    """Rows of 5, 3, 0, 2 and 6 positions, in sixteenths of 5 × 8."""
    kept = np.arange(8)[None] >= 8 - np.array([5, 3, 0, 2, 6])[:, None]
    assert packed_shape(5, 8, 4, 16, 1) == (1, 16)  # 10 positions, in an eighth of the rows
    assert packed_shape(5, 8, 7, 16, 1) == (2, 16)
    assert packed_shape(5, 8, 9, 16, 1) == (3, 8)
    assert packed_shape(5, 8, 9, 16, 4) == (4, 8)
    layout = plan_rows(kept, [4, 0, 1, 2, 3], sizes=16)
    # By decreasing length: 6 5 | 3 2 fill one row of 16.
    assert layout.segment_ids.tolist() == [[1] * 6 + [2] * 5 + [3] * 3 + [4] * 2]
    assert layout.row[0].tolist() == [4] * 6 + [0] * 5 + [1] * 3 + [3] * 2
    assert layout.column[0].tolist() == [*range(2, 8), *range(3, 8), *range(5, 8), 6, 7]
    # Full rows stay as they are.
    assert plan_rows(np.ones((4, 8), bool), range(4), sizes=16) is None


@pytest.fixture(scope="module")
def state():
    policy, critic = (tiny.random_params(m, seed=7) for m in (tiny.DECODER, tiny.SCORER))
    return init_state(ppo.init_params(policy, critic), optax.sgd(1.0))


@pytest.fixture(scope="module")
def step():
    config = ppo.Config(kl_in="loss", kl_estimator="k3", entropy_coef=0.1, vf_coef=0.5)
    return jax.jit(ppo.make_step(tiny.DECODER, tiny.SCORER, optax.sgd(1.0), config))


def check_same_update(state, step, rollout, packed):
    """Loss, metrics and gradient of packed rows are those of the rollout's own."""
    want, want_metrics = step(state, rollout)
    got, metrics = step(state, packed)
    for name, value in want_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    moved = [jax.tree.map(np.subtract, x.params, state.params) for x in (want, got)]
    assert max(np.abs(x).max() for x in jax.tree.leaves(moved[0])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *moved)


def test_loss_and_gradient_are_those_of_the_rows(state, step):
    rollout = short_answers(fill=np.nan)
    (packed,) = ppo.minibatches(KEY, rollout, epochs=1, count=1, pack=16)
    assert packed.tokens.inputs.size <= 0.5 * rollout.tokens.inputs.size
    assert packed.tokens.loss_mask.sum() == rollout.tokens.loss_mask.sum()
    assert packed.scores is packed.finished is packed.valid is None
    check_same_update(state, step, rollout, packed)


def test_every_epoch_packs_every_token_once_into_few_shapes():
    rollout = short_answers((6, 3, 5, 1, 4, 2, 1, 6), (5, 2, 1, 3, 4, 2, 3, 4))
    token = np.asarray(rollout.advantages)[rollout.tokens.loss_mask]
    shapes = set()
    for epoch in (0, 2):
        parts = list(ppo.minibatches(KEY, rollout, epochs=3, count=2, pack=4))[epoch : epoch + 2]
        shapes |= {part.advantages.shape for part in parts}
        found = np.concatenate([np.asarray(p.advantages)[p.tokens.loss_mask] for p in parts])
        np.testing.assert_array_equal(np.sort(found), np.sort(token))
    assert len(shapes) <= 4
    assert all(rows * length < 4 * 17 for rows, length in shapes)


def test_rows_stay_a_multiple_on_a_mesh():
    mesh = make_mesh(fsdp=4, devices=jax.devices()[:4])
    rollout = shard_batch(short_answers(), mesh)
    (part,) = ppo.minibatches(KEY, rollout, epochs=1, count=1, pack=16)
    assert part.advantages.shape[0] % 4 == 0
    assert len(part.advantages.sharding.device_set) == 4
    assert part.tokens.loss_mask.sum() == rollout.tokens.loss_mask.sum()


# Prompts that their answers share


def groups(prompts=(6, 3, 1, 6), answers=(5, 12, 1, 3, 4, 2, 0, 7, 1, 2, 3, 4), fill=0.0):
    """Four prompts with three answers each, in adjacent rows."""
    rollout = short_answers(np.repeat(prompts, 3), answers, fill)
    first = np.arange(12) // 3 * 3
    column = np.arange(rollout.tokens.inputs.shape[1])
    same = column < PROMPT
    inputs = np.where(same, rollout.tokens.inputs[first], rollout.tokens.inputs)
    targets = np.where(column < PROMPT - 1, inputs[:, 1:][:, [*range(len(column) - 1), -1]], 0)
    targets = np.where(column < PROMPT - 1, targets, rollout.tokens.targets)
    return rollout._replace(tokens=rollout.tokens._replace(inputs=inputs, targets=targets))


def test_branches_by_hand():
    """Prompts of 4 and 2 tokens; answers of 2 and 1, and of 3 and 1, from column 4 on."""
    kept = np.array([[1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0],
                     [0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0, 0]], bool)  # fmt: skip
    plan = plan_rows(kept, range(4), sizes=28, samples=2, start=3)
    # One prompt without its last token, then that token with each answer: 3 + 3 + 2, 1 + 4 + 2.
    assert packed_shape(4, 7, 16, 28, 1, 2) == (1, 16)
    assert plan.segment_ids.tolist() == [[1] * 8 + [2] * 7 + [0]]
    assert plan.branch_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 0, 1, 1, 1, 1, 2, 2, 0]]
    assert plan.row.tolist() == [[0] * 6 + [1] * 2 + [2] * 5 + [3] * 2 + [0]]
    assert plan.column.tolist() == [[0, 1, 2, 3, 4, 5, 3, 4, 2, 3, 4, 5, 6, 3, 4, 0]]


def test_answers_that_share_a_prompt_train_as_rows_of_their_own(state, step):
    rollout = groups(fill=np.nan)
    options = {"epochs": 1, "count": 1, "pack": 16}
    (packed,) = ppo.minibatches(KEY, rollout, **options, samples=3)
    (alone,) = ppo.minibatches(KEY, rollout, **options)
    assert packed.tokens.inputs.size < alone.tokens.inputs.size
    # Prompts are there once, except for their last tokens.
    assert (packed.tokens.segment_ids > 0).sum() == sum((5, 2, 0, 5)) + 11 + sum(
        (5, 12, 1, 3, 4, 2, 0, 7, 1, 2, 3, 4)
    )
    check_same_update(state, step, rollout, packed)


@pytest.mark.parametrize("how", ["sequence", "constant"])
def test_every_branch_is_an_answer_to_the_averages(state, how):
    """Means over answers, and a ratio for each answer (GSPO)."""
    config = ppo.Config(loss_aggregation=how, importance_sampling_level="sequence")
    loss = ppo.make_loss(tiny.DECODER, tiny.SCORER, config)
    rollout = groups()
    found = []
    for samples in (1, 3):
        (batch,) = ppo.minibatches(KEY, rollout, epochs=1, count=1, pack=16, samples=samples)
        sums, _ = loss.terms(state.params, batch)
        found.append((sums["policy"], loss.count(batch)["policy"]))
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_values_go_back_where_they_come_from():
    kept = np.array([[0, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    plan = plan_rows(kept, range(3), sizes=12)
    assert (plan.segment_ids == 0).any()  # padding, whose values go nowhere
    packed = np.where(plan.segment_ids > 0, 10.0 * plan.row + plan.column + 1, 99.0)
    want = np.where(kept, 10.0 * np.arange(3)[:, None] + np.arange(4) + 1, 0.0)
    np.testing.assert_array_equal(unpack(packed.astype(np.float32), plan, (3, 4)), want)


def test_groups_that_no_row_holds_are_cut_between_answers():
    rollout = groups((6,) * 4, (12,) * 12)
    (packed,) = ppo.minibatches(KEY, rollout, epochs=1, count=1, pack=16, samples=3)
    assert packed.tokens.loss_mask.sum() == 12 * 12
    parts = list(ppo.minibatches(KEY, rollout, epochs=1, count=4, pack=16, samples=3))
    assert sum(int(part.tokens.loss_mask.sum()) for part in parts) == 12 * 12


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "data": 2}], ids=["one device", "mesh"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared prompts"])
def test_experience_in_packed_rows_is_that_of_the_rows(shared, mesh):
    rollout = groups()
    mesh = mesh and make_mesh(**mesh, devices=jax.devices()[:4])
    models = {"policy": tiny.DECODER, "critic": tiny.SCORER}
    params = {name: tiny.random_params(m, seed=7) for name, m in models.items()}
    reference = tiny.random_params(tiny.DECODER, seed=8)
    # `make_experience` takes rows with the column after the last.
    pad = [(0, 0), (0, 1)]
    tokens = jax.tree.map(lambda x: np.pad(x, pad), rollout.tokens)
    args = tokens, rollout.scores, rollout.finished
    if mesh is not None:
        params = {
            name: jax.device_put(params[name], param_shardings(m.axes, mesh))
            for name, m in models.items()
        }
        reference = jax.device_put(reference, param_shardings(tiny.DECODER.axes, mesh))
        args = shard_batch(args, mesh)
    state = init_state(params, optax.sgd(1.0))

    def experience(**options):
        config = ppo.Config(samples=3, score_at="after_eos", **options)
        return ppo.make_experience(tiny.DECODER, tiny.SCORER, config)(state, reference, *args)

    want = experience()
    got = experience(pack_experience=16, shared_prompts=shared)
    masks = {"old_values": want.value_mask, "returns": want.value_mask}
    for name in ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns", "rewards"):
        mask = masks.get(name, want.tokens.loss_mask)
        a, b = (np.asarray(getattr(x, name))[mask] for x in (got, want))
        assert np.abs(b).max() > 0.01
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", [{"pack": -1}, {"multiple": 0}, {"samples": 0}], ids=str)
def test_numbers_out_of_range_are_refused(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        next(ppo.minibatches(KEY, short_answers(), **options))
