"""A preference loss of your own, with an option, for DPO in Python and in YAML alike.

    python scripts/examples/own_preference_loss.py [FOLDER|FILE.gguf]

B pairs are a batch.
"""

import sys

import jax.numpy as jnp

import jaxalign as ja
from jaxalign import dpo
from jaxalign.losses import preference

PAIRS = [
    {"prompt": question, "chosen": "Gladly, at noon.", "rejected": "No."}
    for question in ("When?", "Can you?", "Is it open?", "Shall we?")
]


def square_hinge(chosen, rejected, *, beta, gap):
    """ℓ = max(0, gap − β (s_c − s_r))², from the log-ratios s to the reference, `[B]` each.

    Unreduced: the step averages over the pairs of the whole batch.
    """
    return jnp.square(jnp.maximum(0.0, gap - beta * (chosen - rejected)))


def register():
    """Adds the loss to the table, once a process. Its options are checked as built-in ones are."""
    if "square_hinge" not in preference.TABLE:
        option = preference.Option(1.0, lambda gap: gap > 0, "a number > 0")
        preference.register("square_hinge", square_hinge, {"gap": option}, difference=True)


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=20):
    """Trains for a few steps; returns the metrics of the last one."""
    register()
    config = dpo.Config(loss_type="square_hinge", loss_options={"gap": 2.0})
    model, params = ja.load_pretrained(source)
    batches = ja.preference_batches(
        PAIRS, ja.load_tokenizer(source), rows=8, length=64, epochs=None
    )
    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=5e-6))
    state = ja.init_state(params, tx)
    step = ja.compile_step(dpo.make_step(model, tx, config), state)
    prepare = dpo.make_prepare(model, config)
    for number, pairs in zip(range(steps), batches, strict=False):
        state, metrics = step(state, prepare(params, pairs))
        print(f"step {number}: loss {metrics['loss']:.3f}")  # the first: gap² = 4
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
