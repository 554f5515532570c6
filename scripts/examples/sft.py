"""Supervised fine-tuning in a loop of your own.

    python scripts/examples/sft.py                 # SmolLM2-135M from the hub
    python scripts/examples/sft.py FOLDER|FILE.gguf

B rows of T positions are a batch; D is the model's width.
"""

import sys

import jaxalign as ja
from jaxalign import sft

# Rows may also be a path, a hub id or a datasets.Dataset.
QUESTIONS = ("What is bread?", "Who are you?", "Is it late?", "How are you?")
ROWS = [
    {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "I like tea."}]}
    for q in QUESTIONS
]


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=20):
    """Trains for a few steps; returns the metrics of the last one."""
    model, params = ja.load_pretrained(source)  # params: nested dict of float32 arrays
    tok = ja.load_tokenizer(source)

    # TokenBatch: inputs, targets, positions, segment_ids and loss_mask, each [B, T] = [8, 64].
    # The template marks the answer; with epochs=None the rows repeat, in a fresh order each time.
    batches = ja.sft_batches(ROWS, tok, rows=8, length=64, epochs=None)

    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=2e-5))  # AdamW; any optax will do
    state = ja.init_state(params, tx)  # a copy of params, the moments, the number of the step
    step = ja.compile_step(sft.make_step(model, tx, sft.Config()), state)

    for number, batch in zip(range(steps), batches, strict=False):
        state, metrics = step(state, batch)  # donates the old state: use the new one
        # loss: nats a trained token, a scalar array on the device until it is printed
        print(f"step {number}: loss {metrics['loss']:.3f}, tokens {metrics['weight/nll']:.0f}")
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
