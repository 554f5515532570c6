"""PPO's critic-free relative GRPO with a reward of your own: a Python function of the text.

    python scripts/examples/ppo.py [FOLDER|FILE.gguf]

B answers are a rollout: 4 to each of 4 prompts. P + R − 1 columns hold prompt and answer.
"""

import sys

import jax

import jaxalign as ja
from jaxalign import ppo
from jaxalign.data import stop_token_ids

PROMPTS = [{"prompt": question} for question in ("When?", "Can you?", "Is it open?", "Shall we?")]


def short(prompt, answer):
    """The reward of one answer; both are text without special tokens."""
    return 1.0 / (1.0 + len(answer))


def main(source="HuggingFaceTB/SmolLM2-135M-Instruct", steps=10):
    """Runs a few iterations; returns the metrics of the last update."""
    model, params = ja.load_pretrained(source)
    tok = ja.load_tokenizer(source)
    # PromptBatch: inputs and mask [4, 32], padded on the left, so that answers start together.
    batches = ja.prompt_batches(PROMPTS, tok, rows=4, length=32, epochs=None)

    config = ppo.Config(
        advantage_estimator="grpo",  # "gae" is PPO: give make_prepare and make_step a critic
        samples=4,
        max_new_tokens=8,
        kl_in="loss",
        kl_estimator="k3",
        stop_tokens=stop_token_ids(tok),
        pad_token=tok.pad_token_id,
    )
    tx = ppo.make_optimizer(ja.make_optimizer(ja.OptimizerConfig(learning_rate=1e-6)))
    state = ja.init_state(ppo.init_params(params), tx)  # params {"policy": …}
    step = ja.compile_step(ppo.make_step(model, None, tx, config), state)
    reward_fn = ja.text_reward(short, tok)  # or any function (tokens, prompts) -> scores [B]
    prepare = ppo.make_prepare(model, None, reward_fn, config)

    for number, prompts in zip(range(steps), batches, strict=False):
        sample_key, order_key = jax.random.split(jax.random.fold_in(jax.random.key(0), number))
        # RolloutBatch: tokens, old and reference log-probabilities, advantages, each [16, 39].
        rollout = prepare(sample_key, state, params, prompts)
        for batch in ppo.minibatches(order_key, rollout, epochs=1, count=2):  # 8 answers each
            state, metrics = step(state, batch)
        print(f"iteration {number}: score {rollout.scores.mean():.3f}")
    return metrics


if __name__ == "__main__":
    main(*sys.argv[1:2])
