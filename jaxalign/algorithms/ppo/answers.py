"""Answers to prompts, and what a reward says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxalign.algorithms.ppo.rollout import join_tokens
from jaxalign.parallel.rules import Rules
from jaxalign.parallel.sharding import all_gather_rows, local_rows, mesh_of, shard_batch, use_mesh
from jaxalign.sampling.generate import Generation, sample
from jaxalign.types import Array, Params, PromptBatch, Scores, TokenBatch

if TYPE_CHECKING:
    from jaxalign.algorithms.ppo import Config

CALIBRATIONS = ("none", "mean", "mean_std")

_join = jax.jit(join_tokens)
_repeat = jax.jit(
    lambda prompts, samples: jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), prompts),
    static_argnums=1,
)

RewardFn = Callable[[TokenBatch, PromptBatch], Array | Scores]
"""(prompts with their answers, the prompts) → float scores `[B]`; see `jaxalign.rewards`."""


def draw_answers(
    key: jax.Array,
    model: Any,
    params: Params,
    prompts: PromptBatch,
    config: Config,
    temperature: float | Array,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
) -> tuple[PromptBatch, Generation, TokenBatch]:
    """Samples `config.samples` answers to each prompt, on `mesh` and by `rules` if those are given.

    Returns:
      (the prompts, each repeated for its answers; the answers; both together as rows).
    """
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
        slots=config.slots,
        cache_dtype=config.cache_dtype,
        mesh=mesh,
        rules=rules,
    )
    with use_mesh(mesh_of(params)):
        if config.samples > 1:
            prompts = _repeat(prompts, config.samples)
        return prompts, answers, _join(prompts, answers, config.pad_token)


def calibrate(
    key: jax.Array,
    model: Any,
    params: Params,
    prompts: PromptBatch,
    reward_fn: RewardFn,
    config: Config,
    how: str,
) -> tuple[float, float]:
    """(shift, scale) that give answers of a reference a mean score of 0, and a spread of 1.

    Mean 0: Stiennon et al. 2020 (arXiv 2009.01325), §3.4; also standard deviation 1: Ziegler et al.
    2019 (arXiv 1909.08593), §2.1. A spread of 0 is left as it is.

    Args:
      key: PRNG key.
      model: the reference.
      params: its parameters.
      prompts: to be answered.
      reward_fn: what is calibrated.
      config: how answers are sampled.
      how: "mean" or "mean_std".
    """
    mesh = mesh_of(params)
    if mesh is not None:
        prompts = shard_batch(prompts, mesh)
    prompts, answers, tokens = draw_answers(key, model, params, prompts, config, config.temperature)
    with use_mesh(mesh):
        scores, _ = score_answers(reward_fn, tokens, prompts, answers.mask)
    if mesh is not None:
        scores = shard_batch(scores, mesh)
    scores, answered = all_gather_rows((scores, jnp.any(answers.mask, axis=1)))
    scores = scores[answered].astype(np.float64)
    spread = float(scores.std())
    scale = spread if how == "mean_std" and spread > 0 and math.isfinite(spread) else 1.0
    return float(scores.mean()), scale


def score_answers(
    reward_fn: RewardFn,
    tokens: TokenBatch,
    prompts: PromptBatch,
    mask: Array,
    calibration: tuple[float, float] | None = None,
) -> tuple[np.ndarray, dict[str, Scores] | None]:
    """Asks a reward for the scores of sampled answers, and looks at them.

    Args:
      reward_fn: the reward.
      tokens: prompts with their answers.
      prompts: the prompts, one a row of `tokens`.
      mask: the answers' tokens, `[B, R]`.
      calibration: (shift, scale); the scores become (score − shift) / scale.

    Returns:
      (float32 `[B]` on the host, 0 for a row without an answer; the scores of each of several
      rewards by name, or None). With several processes these are of the rows of this one, for
      `shard_batch`.

    Raises:
      ValueError: scores of another shape, or one that is not finite.
    """
    mesh = mesh_of((tokens, mask))
    answered = local_rows(jnp.any(jnp.asarray(mask), axis=1), mesh)
    said = reward_fn(tokens, prompts)
    said = said if isinstance(said, Scores) else Scores(said)
    scores = np.asarray(local_rows(said.values, mesh), np.float32)
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
    return np.where(answered, scores, np.float32(0)), said.parts
