"""TRL's PPOTrainer replayed on its own sampled answers, and its loss on bare logits."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from jaxalign.algorithms import ppo
from jaxalign.algorithms.state import init_state
from jaxalign.algorithms.step import make_eval
from jaxalign.algorithms.step import make_step as make_any_step
from jaxalign.models.scorer import pooled_scores
from jaxalign.parallel.jax_private import count_compiled
from jaxalign.sampling.generate import Generation
from jaxalign.types import PromptBatch, RolloutBatch, TrainState

EOS = 2
CONFIG = ppo.Config(
    stop_tokens=(EOS,),
    temperature=0.9,
    kl_coef=0.05,
    gamma=1.0,
    lam=0.95,
    clip_range=0.2,
    clip_range_value=0.2,
    vf_coef=0.1,
    missing_eos_penalty=1.0,
    score_at="after_eos",
    whiten_ddof=1,
)


def answered(vectors):
    """One iteration's prompts and recorded answers as rows, and which answers are finished."""
    queries, answers = vectors["queries"], vectors["postprocessed_responses"]
    prompts = PromptBatch(queries.astype(np.int32), queries != 0, np.arange(len(queries)))
    given = np.arange(answers.shape[1])[None] <= vectors["sequence_lengths"][:, None]
    finished = np.any(answers == EOS, axis=1)
    blank = np.zeros(answers.shape, np.float32)
    generation = Generation(*map(jnp.asarray, (answers.astype(np.int32), blank, given, finished)))
    return ppo.join_tokens(prompts, generation), finished


def test_five_iterations(shared):
    folder = shared / "oracle/ppo/default"
    recorded = np.load(folder / "replay.npz")
    policy = oracle.load(folder / "policy_init.safetensors", oracle.DECODER)
    critic = oracle.load(folder / "value_init.safetensors", oracle.SCORER)
    reference = oracle.load(shared / "oracle/ref.safetensors", oracle.DECODER)
    judge = oracle.load(shared / "oracle/reward.safetensors", oracle.SCORER)

    # One optimizer over both; the rate falls once an iteration, that is every four updates.
    tx = optax.adamw(lambda count: 1e-3 * (1 - (count // 4) / 5), weight_decay=0.0)
    state = init_state(ppo.init_params(policy, critic), tx)
    step = jax.jit(ppo.make_step(oracle.DECODER, oracle.SCORER, tx, CONFIG))
    experience = ppo.make_experience(oracle.DECODER, oracle.SCORER, CONFIG)
    score = jax.jit(lambda tokens: pooled_scores(oracle.SCORER, judge, tokens))
    norms_of = jax.jit(both_norms)

    for i in range(5):
        vectors = {k.removeprefix(f"iter{i}/"): v for k, v in recorded.items() if f"iter{i}/" in k}
        tokens, finished = answered(vectors)
        width = tokens.inputs.shape[1]
        rollout = experience(
            state, reference, tokens, score(tokens), finished, np.zeros((8, width), np.float32)
        )
        start, size = vectors["queries"].shape[1] - 1, vectors["responses"].shape[1]
        assert rollout.advantages.shape == (8, start + size)
        answer, valued = ~vectors["padding_mask"], ~vectors["padding_mask_p1"]

        def compare(got, want, where):
            np.testing.assert_allclose(np.asarray(got)[:, start:][where], want[where], 1e-4, 2e-5)  # noqa: B023

        np.testing.assert_array_equal(rollout.tokens.loss_mask[:, start:], answer)
        np.testing.assert_array_equal(rollout.value_mask[:, start:], valued)
        np.testing.assert_allclose(rollout.scores, vectors["scores"], 1e-4, 1e-5)
        compare(rollout.old_logprobs, vectors["logprobs"], answer)
        compare(rollout.ref_logprobs, vectors["ref_logprobs"], answer)
        compare(rollout.old_logprobs - rollout.ref_logprobs, vectors["kl"], answer)
        compare(rollout.old_values, vectors["values"], valued)
        compare(rollout.rewards, vectors["rewards"], valued)
        compare(rollout.returns, vectors["returns"], valued)
        compare(rollout.advantages, vectors["advantages"], answer)
        metrics = ppo.rollout_metrics(rollout)
        for name in ("kl", "scores", "rlhf_reward", "non_score_reward", "entropy"):
            want = recorded[f"log/objective/{name}"][i]
            if name == "entropy" and not answer.all():
                continue  # TRL's sum counts +1.0 placeholders of padding
            np.testing.assert_allclose(metrics[f"objective/{name}"], want, 1e-4, err_msg=name)

        for epoch in range(4):
            update = 4 * i + epoch
            norms = norms_of(state, rollout)
            want = [recorded[f"grad_norm_{part}"][update] for part in ("policy", "value")]
            np.testing.assert_allclose(norms, want, 1e-4, 1e-5, err_msg=f"update {update}")
            order = vectors["permutations"][epoch]
            state, metrics = step(state, jax.tree.map(lambda x: x[order], rollout))  # noqa: B023
            total = float(np.hypot(*norms))
            np.testing.assert_allclose(metrics["grad_norm"], total, 1e-4, 1e-5)
            if update == 0:
                for part, model, name in MODELS:
                    first = oracle.load(folder / f"{name}_update1.safetensors", model)
                    assert oracle.furthest(state.params[part], first) < 1e-4

    for part, model, name in MODELS:
        final = oracle.load(folder / f"{name}_final.safetensors", model)
        assert oracle.furthest(state.params[part], final) < 1e-4
    assert count_compiled(step) == 1


MODELS = (("policy", oracle.DECODER, "policy"), ("critic", oracle.SCORER, "value"))


def gradient(loss, params, batch):
    """The gradient of a loss, summed up independently of the step."""
    counts = loss.count(batch)

    def value(params):
        sums, _ = loss.terms(params, batch)
        return sum(total / counts[name] for name, total in sums.items())

    return jax.grad(value)(params)


def both_norms(state, rollout):
    """Gradient norms of policy and critic apart."""
    loss = ppo.make_loss(oracle.DECODER, oracle.SCORER, CONFIG)
    grads = gradient(loss, state.params, rollout)
    return [optax.tree.norm(grads[part]) for part in ("policy", "critic")]


@dataclasses.dataclass(frozen=True)
class Table:
    """A model of one's own whose parameters are its logits: `apply` and `head`, nothing else."""

    size: int

    def apply(self, params, inputs, positions=None, segment_ids=None):
        return params["logits"]

    def head(self, params):
        return jnp.eye(self.size)


class TableCritic:
    """A critic whose parameters are its values."""

    def apply(self, params, inputs, positions=None, segment_ids=None):
        return params["values"]

    def scores(self, params, hidden):
        return hidden[..., 0]


@pytest.mark.parametrize("number", range(3))
def test_loss_on_bare_logits(number):
    # A copy of the reference vectors, so that this is checked everywhere.
    folder = pathlib.Path(__file__).parent / "golden"
    options = json.loads((folder / "ppo_loss.json").read_text())[number]
    recorded = np.load(folder / "ppo_loss.npz")
    vectors = {k.split("/", 1)[1]: v for k, v in recorded.items() if k.startswith(f"{number}/")}
    config = ppo.Config(
        temperature=options["temperature"],
        clip_range=options["cliprange"],
        clip_range_value=options["cliprange_value"],
        vf_coef=options["vf_coef"],
    )
    rows, width, vocab = vectors["logits"].shape
    context = int(vectors["context_length"])

    def place(x, fill=0):
        """Per-response arrays `[B, R]` into rows, aligned with targets."""
        row = np.full((rows, width), fill, x.dtype)
        row[:, context - 1 : -1] = x
        return row

    targets = place(vectors["responses"].astype(np.int32))
    blank = np.zeros((rows, width), np.int32)
    answer = place(~vectors["padding_mask"])
    valued = place(~vectors["padding_mask_p1"])
    batch = RolloutBatch(
        tokens=oracle.TokenBatch(blank, targets, blank, blank + 1, answer),
        old_logprobs=place(vectors["old_logprobs"]),
        ref_logprobs=place(vectors["old_logprobs"]),
        old_values=place(vectors["old_values"]),
        advantages=place(vectors["advantages"]),
        returns=place(vectors["returns"]),
        value_mask=valued,
    )
    params = {
        "policy": {"logits": jnp.asarray(vectors["logits"])},
        "critic": {"values": jnp.asarray(vectors["vpred"])},
    }
    loss = ppo.make_loss(Table(vocab), TableCritic(), config)
    tx = optax.sgd(0.0)
    _, metrics = jax.jit(make_any_step(loss, tx))(init_state(params, tx), batch)
    grads = jax.jit(gradient, static_argnums=0)(loss, params, batch)

    def close(name, want):
        np.testing.assert_allclose(metrics[name], want, 1e-5, 1e-6, err_msg=name)

    close("loss", vectors["out/loss"])
    close("loss/policy_avg", vectors["out/pg_loss"])
    close("loss/value_avg", vectors["out/vf_loss"])
    close("policy/clipfrac_avg", vectors["out/pg_clipfrac"])
    close("val/clipfrac_avg", vectors["out/vf_clipfrac"])
    # TRL averages these two over padding too: the KL there is 0, the entropy whatever it is.
    close(
        "policy/approxkl_avg", vectors["out/approxkl"] * (rows * (width - context)) / answer.sum()
    )
    close("val/ratio", vectors["out/ratio"][~vectors["padding_mask"]].mean())
    np.testing.assert_allclose(grads["policy"]["logits"], vectors["grad_logits"], 1e-5, 1e-7)
    np.testing.assert_allclose(grads["critic"]["values"], vectors["grad_vpred"], 1e-5, 1e-7)
    assert np.abs(vectors["grad_logits"]).max() > 1e-2
    evaluated = make_eval(loss)(TrainState(0, params, {}, None), batch)
    total = float(evaluated["loss/policy"].mean() + evaluated["loss/value"].mean())
    np.testing.assert_allclose(total, vectors["out/loss"], 1e-5)
