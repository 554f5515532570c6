"""The score of a trained reward model that has the policy's tokenizer."""

from __future__ import annotations

from collections.abc import Callable

import jax

from jaxalign.models.base import ScalarModel
from jaxalign.models.lm_head import pooled_scores
from jaxalign.parallel.host_memory import on_device
from jaxalign.parallel.sharding import mesh_of, reshard_batch, use_mesh
from jaxalign.types import Array, Params, PromptBatch, TokenBatch


def model_reward(
    scorer: ScalarModel, params: Params, *, shift: float = 0.0, scale: float = 1.0
) -> Callable[[TokenBatch, PromptBatch], Array]:
    """The score of a reward model at the answer's last token, `(r − shift) / scale`.

    Args:
      scorer: a reward model with the policy's tokenizer.
      params: its parameters, used where they lie: on the devices of the answers or on others.
      shift: mean score of reference answers, so that they score 0 (Stiennon et al. 2020).
      scale: their standard deviation; > 0.
    """
    check_scale(scale)

    @jax.jit
    def score(params: Params, tokens: TokenBatch) -> jax.Array:
        return (pooled_scores(scorer, on_device(params), tokens) - shift) / scale

    def reward(tokens: TokenBatch, prompts: PromptBatch) -> Array:
        here, there = mesh_of(tokens), mesh_of(params)
        if here is None or there is None or here == there:
            return score(params, tokens)
        with use_mesh(there):
            return reshard_batch(score(params, reshard_batch(tokens, there)), here)

    return reward


def check_scale(scale: float) -> None:
    """Refuses to divide by what is not positive."""
    if not 0 < scale < float("inf"):
        raise ValueError(f"reward scale={scale}: wanted a positive number")
