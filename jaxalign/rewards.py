"""Reward functions for PPO: `(prompts with answers, prompts) -> scores [B]`.

Any callable of that form will do; here are the two usual ones. With several processes the arrays
are global. A function that computes with them gives global scores; one that reads them in Python
takes `jaxalign.local_rows` of them and gives the scores of those rows, so that each host does its
own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxalign.models.base import ScalarModel
from jaxalign.models.heads import pooled_scores
from jaxalign.sharding import local_rows
from jaxalign.types import Array, Params, PromptBatch, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def model_reward(
    scorer: ScalarModel, params: Params, *, shift: float = 0.0, scale: float = 1.0
) -> Callable[[TokenBatch, PromptBatch], Array]:
    """The score of a reward model at the answer's last token, `(r − shift) / scale`.

    Args:
      scorer: a reward model with the policy's tokenizer.
      params: its parameters, used where they lie.
      shift: mean score of reference answers, so that they score 0 (Stiennon et al. 2020).
      scale: their standard deviation; > 0.
    """
    if not scale > 0:
        raise ValueError(f"reward scale={scale}: wanted a positive number")

    @jax.jit
    def score(params: Params, tokens: TokenBatch) -> jax.Array:
        return (pooled_scores(scorer, params, tokens) - shift) / scale

    return lambda tokens, prompts: score(params, tokens)


def text_reward(
    function: Callable[[str, str], float], tok: PreTrainedTokenizerBase
) -> Callable[[TokenBatch, PromptBatch], np.ndarray]:
    """A score computed from text: `function(prompt, completion) -> float`.

    Special tokens are left out of both texts. The function runs in Python, one row at a time, on
    the host that holds the row; an exception in it stops the run, and so does a score that is not
    finite.
    """

    def score(tokens: TokenBatch, prompts: PromptBatch) -> np.ndarray:
        batch: Any = local_rows((tokens.targets, tokens.loss_mask, prompts.tokens, prompts.mask))
        scores = np.zeros(len(batch[0]), np.float32)
        for row, (targets, answer, prompt, said) in enumerate(zip(*batch, strict=True)):
            if not answer.any():
                continue  # an empty row that fills up the batch
            texts = (
                str(tok.decode(ids, skip_special_tokens=True))
                for ids in (prompt[said], targets[answer])
            )
            scores[row] = float(function(*texts))
        return scores

    return score
