"""PPO without a critic, with one ratio an answer, with a critic on the policy: any layout."""

import cases
import jax
import numpy as np
import pytest
import tiny
from cases import LENGTH, ROWS, Case
from test_contract import PACKED, on_mesh, same, wide

from jaxalign.algorithms import ppo


def _batch(*, critic, text):
    def batch(documents, groups, length, left=False):
        made = cases._rollout_batch(documents, groups, length, left)
        if not critic:
            made = made._replace(old_values=None, returns=None, value_mask=None)
        return made._replace(ptx=made.tokens) if text else made

    return batch


def _spoil(batch, rng):
    nan, mask = np.float32(np.nan), batch.tokens.loss_mask
    names = ("old_logprobs", "ref_logprobs", "advantages")
    spoilt = {name: np.where(mask, getattr(batch, name), nan) for name in names}
    if batch.returns is not None:
        spoilt |= {
            name: np.where(batch.value_mask, getattr(batch, name), nan)
            for name in ("old_values", "returns")
        }
    text = None if batch.ptx is None else tiny.spoil(batch.ptx, rng)
    return batch._replace(tokens=tiny.spoil(batch.tokens, rng), ptx=text, **spoilt)


def _case(name, *, critic=None, text=False, **options):
    config = ppo.Config(temperature=0.9, max_new_tokens=8, **options)
    head = {"score": tiny.SCORER.axes["score"]}, {"score": tiny.SCORER.shapes["score"]}
    axes, shapes = head if critic is not None else (None, None)
    tx = cases.make_optimizer(cases._OPTIMIZER)
    return Case(
        name,
        ppo.init_params(tiny.DECODER.axes, axes),
        ppo.init_params(tiny.DECODER.shapes, shapes),
        lambda tx, **kw: ppo.make_step(tiny.DECODER, critic, tx, config, **kw),
        ppo.make_optimizer(tx, None if critic is None else tx),
        cases._rollout_documents,
        _batch(critic=critic is not None, text=text),
        _spoil,
    )


GROUPS = {"advantage_estimator": "grpo", "samples": 2}
PPO_CASES = (
    _case("grpo", **GROUPS, loss_aggregation="sequence", kl_in="loss", kl_estimator="k3"),
    _case("gspo", **GROUPS, loss_aggregation="constant", importance_sampling_level="sequence"),
    _case("shared", critic=tiny.SCORER, text=True, shared_critic=True, ptx_coef=0.5),
)
MESHES = {"grpo": "rows4", "gspo": "2x2x2", "shared": "2x2x2"}


@pytest.fixture(scope="module", params=PPO_CASES, ids=repr)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def expected(case):
    """One device, one micro-batch, one padded example a row: (new parameters, metrics)."""
    state, metrics = case.jitted()(case.state(), case.padded())
    return jax.device_get((state.params, metrics))


def test_expected_step_moves_every_parameter(case, expected):
    params, metrics = expected
    assert metrics["grad_norm"] > 1e-3
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-4, params, case.params)
    assert all(jax.tree.leaves(moved)), moved


def test_eight_devices_and_micro_batches_agree_with_one_and_compile_once(case, expected):
    step, fresh = on_mesh(case, MESHES[case.name])
    state, metrics = step(fresh(), case.padded())
    same(expected, (state, metrics))
    state, metrics = step(state, case.padded(1))
    assert np.isfinite(metrics["loss"])
    assert step.compiles == 1


def test_padding_packing_and_garbage_do_not_show(case, expected):
    """Padded on the left, with empty rows, packed, and spoilt wherever nothing is to be read."""
    jitted = case.jitted()
    for batch in (wide(case, [[i] for i in range(ROWS)], left=True), wide(case, PACKED)):
        same(expected, jitted(case.state(), batch))
        same(expected, jitted(case.state(), case.spoil(batch, np.random.default_rng(9))))


def test_batch_of_empty_rows_moves_nothing_but_decay(case):
    batch = case.batch(case.documents(np.random.default_rng(0)), [[]] * ROWS, LENGTH)
    _, metrics = case.jitted()(case.state(), batch)
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(value) for value in metrics.values())
