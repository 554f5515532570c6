"""`prepare`: one PPO iteration's experience, from prompts to a rollout.

    1. sample answers with the policy
    2. score them with the reward function, which may run any Python
    3. … 7. log-probabilities, KL, rewards, advantages, rollout: `ppo.experience`, one program

Then the sampler's log-probabilities are compared with the trainer's: a difference means that the
rollout is off-policy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.ppo.config import Config
from jaxalign.algorithms.ppo.controllers import ScoreStats, running_scale
from jaxalign.algorithms.ppo.experience import make_experience
from jaxalign.algorithms.ppo.figures import logprob_difference
from jaxalign.algorithms.ppo.rows import answer_mask_of, join_tokens
from jaxalign.algorithms.prepare import Prepare
from jaxalign.models.base import LanguageModel, ScalarModel, combine
from jaxalign.models.decoder import Decoder
from jaxalign.parallel.rules import Rules
from jaxalign.parallel.sharding import all_gather_rows, local_rows, mesh_of, shard_batch, use_mesh
from jaxalign.sampling.generate import Generation, sample
from jaxalign.sampling.stream import Watch
from jaxalign.sampling.weights import sampling_weights
from jaxalign.types import (
    Array,
    Params,
    PromptBatch,
    RolloutBatch,
    Scores,
    TokenBatch,
    TrainState,
)

CALIBRATIONS = ("none", "mean", "mean_std")

RewardFn = Callable[[TokenBatch, PromptBatch], Array | Scores]
"""(prompts with their answers, the prompts) → float scores `[B]`; see `jaxalign.rewards`."""

_join = jax.jit(join_tokens)
_repeat = jax.jit(
    lambda prompts, samples: jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts),
    static_argnums=1,
)


def make_prepare(
    model: Decoder,
    critic: ScalarModel | None,
    reward_fn: RewardFn,
    config: Config | None = None,
    *,
    reference: LanguageModel | None = None,
    rollout_mesh: Mesh | None = None,
    rollout_rules: Rules | None = None,
) -> Prepare[..., RolloutBatch]:
    """Builds `prepare(key, state, ref_params, prompts, kl_coef=None, …) -> RolloutBatch`.

    It builds one iteration's experience: answers sampled from the policy, scores from `reward_fn`,
    per-token KL against the frozen reference, advantages, and with a critic also values and
    returns. Weights are used in place, not copied. A prompt's `samples` answers are adjacent rows.

    Args:
      model: the policy.
      critic: value model; None if the advantages need none.
      reward_fn: returns a finite score for every answer; runs outside jit, so it may be any Python.
      config: options.
      reference: the model of `ref_params`; None: the policy's.
      rollout_mesh: the mesh on which answers are sampled, see `sample`; None: the policy's.
      rollout_rules: sharding rules while sampling, see `sample`; None: the training rules.

    Returns:
      `prepare(key, state, ref_params, prompts, kl_coef=None, *, temperature=None, calibration=None,
      score_stats=None, slots=None)`. `kl_coef` and `temperature` override the configured ones
      without recompilation, `slots` overrides `config.slots`. `calibration = (shift, scale)` turns
      the scores of `reward_fn` into (score − shift) / scale. With `normalize_scores`, `score_stats`
      are the statistics of all scores so far (`next_score_stats` adds this rollout's). `prepare`
      raises ValueError if a score is not finite, or if the sampler's log-probabilities differ from
      the trainer's by more than `logprob_tolerance` on average. `.lower` is the `lower` of
      `make_experience`.
    """
    config = Config() if config is None else config
    config.check_stop_tokens()
    if config.router_replay:
        config.check_experts(model.config.num_experts)
    if not config.stop_tokens:
        print(
            f"ppo: no stop_tokens, so every answer has max_new_tokens={config.max_new_tokens} "
            "tokens; jaxalign.data.stop_token_ids(tok) gives a tokenizer's",
            file=sys.stderr,
        )
    experience = make_experience(model, critic, config, reference=reference)

    def prepare(
        key: jax.Array,
        state: TrainState,
        ref_params: Params,
        prompts: PromptBatch,
        kl_coef: float | Array | None = None,
        *,
        temperature: float | Array | None = None,
        calibration: tuple[float, float] | None = None,
        score_stats: ScoreStats | None = None,
        slots: int | None = None,
    ) -> RolloutBatch:
        mesh = mesh_of(state.params)
        temperature = config.temperature if temperature is None else temperature
        temperature = jnp.asarray(temperature, jnp.float32)
        kl_coef = jnp.asarray(config.kl_coef if kl_coef is None else kl_coef, jnp.float32)

        # 1. Sample: B = prompts · samples answers of up to R tokens.
        policy = combine(state.params, state.frozen)["policy"]
        watch = early_watch(reward_fn, prompts, config) if config.score_early else None
        prompts, answers, tokens = sample_answers(
            key, model, policy, _on_mesh(prompts, mesh), config, temperature,
            mesh=rollout_mesh, rules=rollout_rules, slots=slots, watch=watch,
        )  # fmt: skip
        with use_mesh(mesh):
            # 2. Score: [B] on the host, then split over the mesh.
            scores, parts = score_answers(reward_fn, tokens, prompts, answers.mask, calibration)
            scores, parts = _on_mesh((scores, parts), mesh)
            scale = None
            if config.normalize_scores:
                scale = running_scale(scores, answers, config.missing_eos_penalty, score_stats)
            # 3. to 7.
            sampler_logprobs = _on_mesh(_aligned_with_targets(prompts, answers), mesh)
            rollout = experience(
                state, ref_params, tokens, scores, answers.finished, sampler_logprobs, kl_coef,
                temperature, scale, experts=answers.experts,
            )  # fmt: skip
            _check_on_policy(rollout, sampler_logprobs, config)
        return rollout._replace(reward_parts=parts)

    return Prepare(prepare, experience.lower)


def early_watch(reward_fn: RewardFn, prompts: PromptBatch, config: Config) -> Watch:
    """Scores answers while others are being written, see `TextReward.early_watch`.

    Raises:
      ValueError: several processes, or no reward that scores each answer by itself.
    """
    if jax.process_count() > 1:
        raise ValueError(f"ppo score_early=True on {jax.process_count()} processes: wanted one")
    repeated = PromptBatch(*(np.asarray(x).repeat(config.samples, axis=0) for x in prompts))
    start = getattr(reward_fn, "early_watch", None)
    watch = None if start is None else start(repeated)
    if watch is None:
        raise ValueError(
            "ppo score_early=True: no reward scores each answer by itself in Python; wanted one "
            "that text_reward makes (function with calls: row, gsm8k, ifeval, regex)"
        )
    return watch


def sample_answers(
    key: jax.Array,
    model: Decoder,
    params: Params,
    prompts: PromptBatch,
    config: Config,
    temperature: float | Array,
    *,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    slots: int | None = None,
    watch: Watch | None = None,
) -> tuple[PromptBatch, Generation, TokenBatch]:
    """Samples `config.samples` answers to each prompt, on `mesh` and with `rules` if given.

    `slots` overrides `config.slots`; for `watch` see `sample`.

    Returns:
      (the prompts, each repeated for its answers; the answers; prompts and answers joined as rows).
    """
    home = mesh_of(params)
    model, params = sampling_weights(model, params, config.sampling_weights)
    answers = sample(
        model,
        params,
        prompts,
        key,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        stop_tokens=config.stop_tokens,
        pad_token=config.pad_token,
        samples=config.samples,
        slots=config.slots if slots is None else slots,
        cache_dtype=config.cache_dtype,
        mesh=mesh,
        rules=rules,
        keep_experts=config.router_replay,
        speculate=config.speculate,
        watch=watch,
    )
    with use_mesh(home):
        if config.samples > 1:
            prompts = _repeat(prompts, config.samples)
        return prompts, answers, _join(prompts, answers, config.pad_token)


def score_answers(
    reward_fn: RewardFn,
    tokens: TokenBatch,
    prompts: PromptBatch,
    mask: Array,
    calibration: tuple[float, float] | None = None,
) -> tuple[np.ndarray, dict[str, Scores] | None]:
    """Scores sampled answers and checks the scores.

    Args:
      reward_fn: the reward.
      tokens: prompts with their answers.
      prompts: the prompts, one per row of `tokens`.
      mask: the answers' tokens, `[B, R]`.
      calibration: (shift, scale); the scores become (score − shift) / scale.

    Returns:
      (float32 `[B]` on the host, 0 for a row without an answer; the scores of each of several
      rewards by name, or None). With several processes both cover only this process's rows, for
      `shard_batch`.

    Raises:
      ValueError: scores of the wrong shape, or a score that is not finite.
    """
    mesh = mesh_of((tokens, mask))
    answered = local_rows(jnp.any(jnp.asarray(mask), axis=1), mesh)
    result = reward_fn(tokens, prompts)
    result = result if isinstance(result, Scores) else Scores(result)
    scores = np.asarray(local_rows(result.values, mesh), np.float32)
    if scores.shape != answered.shape:
        raise ValueError(
            f"reward_fn gave shape {scores.shape}, wanted one score a row {answered.shape}"
        )
    bad = np.flatnonzero(~np.isfinite(scores) & answered)
    if bad.size:
        raise ValueError(
            f"reward_fn gave {scores[bad[0]]} for row {bad[0]} ({bad.size} rows not finite); "
            "a failing reward must raise or give a finite score"
        )
    if calibration is not None:
        scores = (scores - np.float32(calibration[0])) / np.float32(calibration[1])
    return np.where(answered, scores, np.float32(0)), result.parts


def calibrate(
    key: jax.Array,
    model: Decoder,
    params: Params,
    prompts: PromptBatch,
    reward_fn: RewardFn,
    config: Config,
    how: str,
) -> tuple[float, float]:
    """(shift, scale) that give a reference's answers a mean score of 0, and optionally spread 1.

    Mean 0: Stiennon et al. 2020 (arXiv 2009.01325), §3.4; also standard deviation 1: Ziegler et al.
    2019 (arXiv 1909.08593), §2.1. If the scores have no spread, the scale is 1.

    Args:
      key: PRNG key.
      model: the reference.
      params: its parameters.
      prompts: the prompts to answer.
      reward_fn: the reward to calibrate.
      config: how answers are sampled.
      how: "mean" or "mean_std".
    """
    mesh = mesh_of(params)
    prompts, answers, tokens = sample_answers(
        key, model, params, _on_mesh(prompts, mesh), config, config.temperature
    )
    with use_mesh(mesh):
        scores, _ = score_answers(reward_fn, tokens, prompts, answers.mask)
    scores, answered = all_gather_rows((_on_mesh(scores, mesh), jnp.any(answers.mask, axis=1)))
    scores = scores[answered].astype(np.float64)
    spread = float(scores.std())
    scale = spread if how == "mean_std" and spread > 0 and math.isfinite(spread) else 1.0
    return float(scores.mean()), scale


def _aligned_with_targets(prompts: PromptBatch, answers: Generation) -> jax.Array:
    """The sampler's log-probabilities `[B, R]` at the positions that predict them: `[B, P + R]`.

    The first answer token is predicted in the last of the P columns of its prompt.
    """
    rows = answers.tokens.shape[0]
    before = jnp.zeros((rows, prompts.tokens.shape[1] - 1))
    return jnp.concatenate([before, answers.logprobs, jnp.zeros((rows, 1))], axis=1)


def _check_on_policy(rollout: RolloutBatch, sampler_logprobs: jax.Array, config: Config) -> None:
    mask = answer_mask_of(rollout)
    # The rollout has one column fewer: nothing follows the last one.
    sampled = sampler_logprobs[:, : mask.shape[1]]
    difference = float(logprob_difference(rollout.old_logprobs, sampled, mask)[0])
    if not difference <= config.logprob_tolerance:
        raise ValueError(
            f"sampler and trainer log-probabilities differ by {difference:.3g} nats a token "
            f"on average; wanted at most logprob_tolerance={config.logprob_tolerance}. "
            "Rollouts would be off-policy: check dtypes and that both use the same model."
        )


def _on_mesh(batch: Any, mesh: Mesh | None) -> Any:
    return batch if mesh is None else shard_batch(batch, mesh)
