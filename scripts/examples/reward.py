"""A reward model from preference pairs, and its scores.

    python scripts/examples/reward.py [FOLDER|FILE.gguf]

B pairs are a batch; each of the two answers has rows of T positions.
"""

import sys

import jax

import jaxalign as ja
from jaxalign import reward

PAIRS = [
    {"prompt": question, "chosen": "Gladly, at noon.", "rejected": "No."}
    for question in ("When?", "Can you?", "Is it open?", "Shall we?")
]


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=20):
    """Trains for a few steps; returns the metrics of the last one."""
    model, params = ja.load_pretrained(source)
    tok = ja.load_tokenizer(source)

    # The body of the language model with a fresh head [D, 1] in place of the vocabulary's.
    scorer, params = ja.with_scalar_head(model, params, jax.random.key(0))

    # PairBatch: `chosen` and `rejected`, two TokenBatches of [B, T] = [8, 64].
    batches = ja.preference_batches(PAIRS, tok, rows=8, length=64, epochs=None)

    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-5))
    state = ja.init_state(params, tx)
    config = reward.Config(center_coef=0.01)  # holds the scores near 0
    step = ja.compile_step(reward.make_step(scorer, tx, config), state)

    for number, pairs in zip(range(steps), batches, strict=False):
        state, metrics = step(state, pairs)
        print(f"step {number}: loss {metrics['loss']:.3f}, accuracy {metrics['accuracy']:.2f}")

    # The score of each conversation, read at the end of its answer: float32 [2].
    said = [
        [{"role": "user", "content": "When?"}, {"role": "assistant", "content": answer}]
        for answer in ("Gladly, at noon.", "No.")
    ]
    print("scores:", ja.score_conversations(scorer, state.params, tok, said))
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
