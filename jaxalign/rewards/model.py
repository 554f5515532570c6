"""The reward of a trained reward model that has the policy's tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxalign.models.base import ScalarModel
from jaxalign.models.scorer import pooled_scores
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, reshard_batch, use_mesh
from jaxalign.types import Array, Params, PromptBatch, TokenBatch


def model_reward(
    scorer: ScalarModel, params: Params, *, shift: float = 0.0, scale: float = 1.0
) -> Callable[[TokenBatch, PromptBatch], Array]:
    """The score of a reward model at the answer's last token, shifted and scaled.

        (r − shift) / scale

    Args:
      scorer: a reward model with the policy's tokenizer.
      params: its parameters. If they are on another mesh than the answers, the answers are
        resharded to that mesh, and the scores back.
      shift: mean score of reference answers, so that they score 0 (Stiennon et al. 2020).
      scale: standard deviation of their scores; > 0.
    """
    check_scale(scale)

    @jax.jit
    def score(params: Params, tokens: TokenBatch) -> jax.Array:
        return (pooled_scores(scorer, on_device(params), tokens) - shift) / scale

    def reward(tokens: TokenBatch, prompts: PromptBatch) -> Array:
        answers, model = mesh_of(tokens), mesh_of(params)
        if answers is None or model is None or answers == model:
            return score(params, tokens)
        with use_mesh(model):
            return reshard_batch(score(params, reshard_batch(tokens, model)), answers)

    # The program that scores, lowered for (params, tokens), as arrays or shapes.
    reward.lower = score.lower  # pyrefly: ignore[missing-attribute]
    return reward


def check_scale(scale: float) -> None:
    """Checks the divisor of a score."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"reward scale={scale}: wanted a positive number")
