"""DPO: preference pairs, a frozen reference, no reward model.

    python scripts/examples/dpo.py [FOLDER|FILE.gguf]

B pairs are a batch; each of the two answers has rows of T positions.
"""

import sys

import jaxalign as ja
from jaxalign import dpo

PAIRS = [
    {"prompt": question, "chosen": "Gladly, at noon.", "rejected": "No."}
    for question in ("When?", "Can you?", "Is it open?", "Shall we?")
]


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=20):
    """Trains for a few steps; returns the metrics of the last one."""
    model, params = ja.load_pretrained(source)
    tok = ja.load_tokenizer(source)

    # PairBatch: `chosen` and `rejected`, two TokenBatches of [B, T] = [8, 64].
    batches = ja.preference_batches(PAIRS, tok, rows=8, length=64, epochs=None)

    config = dpo.Config(beta=0.1)
    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=5e-6))
    state = ja.init_state(params, tx)  # a copy, so `params` can go on as the reference
    step = ja.compile_step(dpo.make_step(model, tx, config), state)

    # The step never sees the reference: `prepare` adds log π_ref of both answers, [B] each.
    # They do not change, so a program that runs several epochs may compute them once.
    prepare = dpo.make_prepare(model, config)

    for number, pairs in zip(range(steps), batches, strict=False):
        state, metrics = step(state, prepare(params, pairs))
        # The first loss is log 2 = 0.693: policy and reference are still equal.
        print(
            f"step {number}: loss {metrics['loss']:.3f}, "
            f"margin {metrics['rewards/margins']:.3f}, log π {metrics['logps/chosen']:.1f}"
        )
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
