"""One step on 8 devices, here 8 fake ones of a processor: 2 × data, 2 × fsdp, 2 × tensor.

    python scripts/examples/sharded.py [FOLDER|FILE.gguf]

B rows of T positions are a batch; the loss does not depend on the mesh.
"""

import sys

import jax

import jaxalign as ja
from jaxalign import sft

TALKS = [{"prompt": question, "completion": "I like tea."} for question in ("Hi", "Who?", "When?")]


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=3, **axes):
    """Trains for a few steps; returns the metrics of the last one.

    Args:
      source: a model whose heads, columns and width the axes divide.
      steps: how many updates.
      **axes: sizes of the axes of the mesh; those of the example by default.
    """
    mesh = ja.make_mesh(**(axes or {"data": 2, "fsdp": 2, "tensor": 2}))
    model, params = ja.load_pretrained(source, mesh=mesh)  # each device reads its own part
    tok = ja.load_tokenizer(source)
    batches = ja.sft_batches(TALKS, tok, rows=16, length=64, epochs=None)  # [B, T] = [16, 64]

    tx = ja.make_optimizer(ja.OptimizerConfig(learning_rate=2e-5))
    state = ja.init_state(params, tx)  # moments lie where their parameters lie
    # Pins every sharding of the state; data × fsdp split the rows of a batch: 4 for two devices.
    step = ja.compile_step(sft.make_step(model, tx), state, mesh)
    print(step.placement)
    for number, batch in zip(range(steps), batches, strict=False):
        state, metrics = step(state, batch)
        print(f"step {number}: loss {metrics['loss']:.4f}, compiles {step.compiles}")

    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)[:3]:
        print(jax.tree_util.keystr(path), leaf.shape, leaf.sharding.spec)
    return metrics


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # before anything asks for devices
    # Its 9 heads do not split in two: all 8 devices share along fsdp.
    main(*sys.argv[1:2], data=2, fsdp=4)
