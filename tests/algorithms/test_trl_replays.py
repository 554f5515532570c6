"""Five optimizer steps of TRL's trainers, replayed: loss, gradient norm, metrics, weights."""

import jax
import numpy as np
import oracle
import pytest

from jaxalign.algorithms import dpo, reward, sft
from jaxalign.algorithms.optim import OptimizerConfig, make_optimizer
from jaxalign.algorithms.state import init_state
from jaxalign.parallel.jax_private import count_compiled
from jaxalign.types import PairBatch

TX = make_optimizer(
    OptimizerConfig(
        learning_rate=1e-3,
        schedule="linear",
        warmup_steps=2,
        total_steps=5,
        weight_decay=0.01,
        max_grad_norm=1.0,
    )
)


def pad_rows(tensors, length):
    """Columns of padding up to one length, so that five batches are one shape."""
    return {
        name: np.pad(x, ((0, 0), (0, length - x.shape[1])), constant_values=-100 * ("lab" in name))
        for name, x in tensors.items()
        if x.ndim == 2
    }


def halves(tensors):
    """TRL's rows, all chosen and then all rejected, as a `PairBatch`."""
    trained = tensors.get("completion_mask")
    whole = oracle.rows(tensors["input_ids"], tensors["attention_mask"], trained)
    pairs = len(whole.inputs) // 2
    return PairBatch(
        chosen=jax.tree.map(lambda x: x[:pairs], whole),
        rejected=jax.tree.map(lambda x: x[pairs:], whole),
    )


def documents(tensors):
    return oracle.rows(tensors["input_ids"], tensors["attention_mask"], tensors["labels"] != -100)


def replay(folder, model, step, batch, logged):
    """Runs the five steps; `logged` maps our metrics to TRL's."""
    vectors = np.load(folder / "replay.npz")
    state = init_state(oracle.load(folder / "weights_init.safetensors", model), TX)
    step = jax.jit(step)
    for i in range(5):
        prefix = f"micro{i}/"
        tensors = {k.removeprefix(prefix): v for k, v in vectors.items() if k.startswith(prefix)}
        state, metrics = step(state, batch(pad_rows(tensors, 32)))
        for name, theirs in logged.items():
            want = vectors[f"log/{theirs}"][i]
            np.testing.assert_allclose(metrics[name], want, 1e-4, 1e-5, err_msg=f"{name} step {i}")
        if i == 0:  # the first learning rate of a warm-up is 0
            first = oracle.load(folder / "weights_step1.safetensors", model)
            assert oracle.furthest(state.params, first) == 0
    final = oracle.load(folder / "weights_final.safetensors", model)
    assert oracle.furthest(state.params, final) < 1e-4
    start = oracle.load(folder / "weights_init.safetensors", model)
    assert oracle.furthest(state.params, start) > 1e-3
    assert count_compiled(step) == 1


def test_sft(shared):
    step = sft.make_step(oracle.DECODER, TX)
    logged = {"loss": "loss", "grad_norm": "grad_norm"}
    replay(shared / "oracle/sft", oracle.DECODER, step, documents, logged)


def test_reward(shared):
    step = reward.make_step(oracle.SCORER, TX)
    logged = {k: k for k in ("loss", "grad_norm", "accuracy", "margin")}
    replay(shared / "oracle/rm", oracle.SCORER, step, halves, logged)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_dpo(shared, micro_batches):
    reference = oracle.load(shared / "oracle/ref.safetensors", oracle.DECODER)
    prepare = dpo.make_prepare(oracle.DECODER)
    step = dpo.make_step(oracle.DECODER, TX, dpo.Config(beta=0.1), micro_batches=micro_batches)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    logged = {k: k for k in ("loss", "grad_norm", "logps/chosen", "logps/rejected", *names)}
    replay(
        shared / "oracle/dpo",
        oracle.DECODER,
        step,
        lambda tensors: prepare(reference, halves(tensors)),
        logged,
    )


def test_dpo_without_reference_is_refused():
    batch = PairBatch(*(oracle.rows(np.ones((1, 4)), np.ones((1, 4))) for _ in range(2)))
    loss = dpo.make_loss(oracle.DECODER)
    with pytest.raises(ValueError, match=r"ref_chosen_logps.*make_prepare"):
        jax.eval_shape(loss.terms, oracle.DECODER.shapes, batch)
