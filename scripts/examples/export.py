"""LoRA, merged and written as a Hugging Face folder, read back, and sampled from.

    python scripts/examples/export.py FOLDER_TO_WRITE [FOLDER|FILE.gguf]

B rows of T positions are a batch.
"""

import sys

import jax

import jaxalign as ja
from jaxalign import sft

TALKS = [{"prompt": question, "completion": "I like tea."} for question in ("Hi", "Who?", "When?")]


def main(out, source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=20):
    """Trains adapters, writes `out`; returns the answer of the model that was read back."""
    model, params = ja.load_pretrained(source)
    tok = ja.load_tokenizer(source)

    # For each projection [I, O] two matrices [I, 8] and [8, O]; the second starts at 0.
    config = ja.LoraConfig(rank=8, alpha=16)
    adapted, adapters, base = ja.add_lora(model, params, jax.random.key(0), config)

    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=2e-4))
    state = ja.init_state(adapters, tx, frozen=base)  # only the adapters have gradients and moments
    step = ja.compile_step(sft.make_step(adapted, tx), state)
    # TokenBatch, each array [B, T] = [8, 64].
    batches = ja.sft_batches(TALKS, tok, rows=8, length=64, epochs=None)
    for number, batch in zip(range(steps), batches, strict=False):
        state, metrics = step(state, batch)
        print(f"step {number}: loss {metrics['loss']:.3f}")

    both = ja.combine(state.params, state.frozen)
    model, merged = ja.merge_lora(adapted, both)  # plain weights again: W + α/r · A B
    ja.save_pretrained(model, merged, out, tokenizer=tok)  # AutoModelForCausalLM loads it too

    model, params = ja.load_pretrained(out)
    (answer,) = ja.generate(model, params, tok, ["Hi"], max_new_tokens=8, temperature=0.0)
    print("Hi →", answer)
    return answer


if __name__ == "__main__":
    main(*sys.argv[1:3])
