"""SFT with DFT's loss, against −sg(p)·log p written out on the model's logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

import jaxalign as ja
from jaxalign import sft

PARAMS = tiny.random_params(tiny.DECODER, 5)


def batch(rows=4):
    rng = np.random.default_rng(0)
    documents = [tiny.document(rng, length, 2) for length in (9, 5, 12, 7)]
    return tiny.token_batch(tiny.lay(documents, tiny.alone(4, rows), 12))


def plainly(params, tokens):
    """Loss and likelihood of the trained tokens, from whole logits."""
    model = tiny.DECODER
    hidden = model.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
    logs = jax.nn.log_softmax(model.logits(params, hidden).astype(jnp.float32))
    chosen = jnp.take_along_axis(logs, tokens.targets[..., None], -1)[..., 0][tokens.loss_mask]
    return -jnp.mean(jax.lax.stop_gradient(jnp.exp(chosen)) * chosen), -jnp.mean(chosen)


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_step_equals_the_formula(micro_batches):
    """Loss, the metric beside it, and the gradient, which one step of SGD shows."""
    tokens, tx = batch(), optax.sgd(1.0)
    config = sft.Config(loss_type="dft", log_entropy=micro_batches == 2)
    step = jax.jit(sft.make_step(tiny.DECODER, tx, config, micro_batches=micro_batches))
    after, metrics = step(ja.init_state(PARAMS, tx), tokens)
    (loss, likelihood), gradient = (
        plainly(PARAMS, tokens),
        jax.grad(lambda p: plainly(p, tokens)[0])(PARAMS),
    )
    assert float(metrics["loss"]) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(float(likelihood), rel=1e-5)
    assert ("entropy" in metrics) == (micro_batches == 2)
    moved = jax.tree.map(lambda a, b: a - b, PARAMS, after.params)
    for got, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match="sft loss_type='dtf': wanted one of nll, dft"):
        sft.Config(loss_type="dtf")
