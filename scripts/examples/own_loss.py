"""A loss of your own in the step of all algorithms: label smoothing of SFT.

    python scripts/examples/own_loss.py [FOLDER|FILE.gguf]

B rows of T positions are a batch; V is the vocabulary.
"""

import sys

import jax
import jax.numpy as jnp

import jaxalign as ja

TALKS = [{"prompt": question, "completion": "I like tea."} for question in ("Hi", "Who?", "When?")]
EPSILON = 0.1


def make_loss(model):
    """Cross-entropy with a share ε of every target spread over the whole vocabulary."""

    def count(batch):
        # What each term is divided by, over the whole batch, however it is cut into micro-batches.
        return {"smoothed": jnp.sum(batch.loss_mask, dtype=jnp.float32)}

    def terms(params, batch):
        hidden = model.apply(params, batch.inputs, batch.positions, batch.segment_ids)  # [B, T, D]
        # Fine for a small model; ja.target_logprobs needs no array [B, T, V] where it suffices.
        logprobs = jax.nn.log_softmax(model.logits(params, hidden))  # [B, T, V]
        target = jnp.take_along_axis(logprobs, batch.targets[..., None], axis=-1)[..., 0]  # [B, T]
        losses = -(1 - EPSILON) * target - EPSILON * jnp.mean(logprobs, axis=-1)
        # `where`, not a product with the mask: 0 · nan is nan.
        total = jnp.sum(jnp.where(batch.loss_mask, losses, 0.0))
        nll = -jnp.sum(jnp.where(batch.loss_mask, target, 0.0))
        weight = jnp.sum(batch.loss_mask, dtype=jnp.float32)
        return {"smoothed": total}, {"nll": ja.Weighted(nll, weight)}  # sums, not means

    return ja.Loss(count, terms)


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=20):
    """Trains for a few steps; returns the metrics of the last one."""
    model, params = ja.load_pretrained(source)
    batches = ja.sft_batches(TALKS, ja.load_tokenizer(source), rows=16, length=64, epochs=None)
    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=2e-5))
    state = ja.init_state(params, tx)
    step = ja.compile_step(ja.make_step(make_loss(model), tx, micro_batches=2), state)
    for number, batch in zip(range(steps), batches, strict=False):
        state, metrics = step(state, batch)
        print(f"step {number}: loss {metrics['loss']:.3f}, nll {metrics['nll']:.3f}")
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
