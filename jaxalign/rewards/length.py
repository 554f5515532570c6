"""Penalties on the length of an answer, in tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from jaxalign.parallel.sharding import local_rows
from jaxalign.rewards.specs import BuildContext, RewardFunction, RewardSpec, register_reward
from jaxalign.types import PromptBatch, TokenBatch


def length_reward(
    *,
    longest: int | None = None,
    cache: int = 0,
    target: int | None = None,
    width: int | None = None,
) -> Callable[[TokenBatch, PromptBatch], np.ndarray]:
    """A penalty in [−1, 0] for answers that are too long, or far from a target length.

    With `longest`, the soft overlong punishment of DAPO (Yu et al. 2025, eq. 13,
    https://arxiv.org/abs/2503.14476):

        r = 0                              for n ≤ longest − cache
        r = (longest − cache − n) / cache  for n ≤ longest
        r = −1                             beyond

    With `target`:

        r = −min(1, |n − target| / width)

    n counts the answer's tokens including its stop token. An answer truncated at `max_new_tokens`
    has n = `max_new_tokens`, so with a larger `longest` no answer gets the full penalty.

    Args:
      longest: the number of tokens from which the penalty is full.
      cache: over this many tokens before `longest` the penalty grows; 0: a step.
      target: the target length in tokens.
      width: distance from the target at which the penalty is full, tokens; None: `target`.

    Returns:
      A reward function.

    Raises:
      ValueError: not exactly one of `longest` and `target`, or numbers out of range.
    """
    check_length(longest, cache, target, width)

    def reward(tokens: TokenBatch, prompts: PromptBatch) -> np.ndarray:
        counts = np.asarray(local_rows(tokens.loss_mask)).sum(axis=1)
        if target is not None:
            return punish_distance(counts, target, target if width is None else width)
        return punish_overlong(counts, longest or 0, cache)

    return reward


def punish_overlong(counts: np.ndarray, longest: int, cache: int) -> np.ndarray:
    """DAPO's eq. 13: 0 up to `longest − cache` tokens, falling to −1 at `longest`; float32."""
    start = longest - cache
    if cache == 0:
        return -(np.asarray(counts) > longest).astype(np.float32)
    return np.clip((start - np.asarray(counts)) / cache, -1, 0).astype(np.float32)


def punish_distance(counts: np.ndarray, target: int, width: int) -> np.ndarray:
    """`−min(1, |n − target| / width)`, float32."""
    return -np.minimum(1, np.abs(np.asarray(counts) - target) / width).astype(np.float32)


def check_length(longest: int | None, cache: int, target: int | None, width: int | None) -> None:
    """Checks the options of `length_reward`."""
    if (longest is None) == (target is None):
        raise ValueError(
            f"length reward with longest={longest}, target={target}: wanted exactly one of them"
        )
    if target is not None:
        if cache:
            raise ValueError(f"length reward cache={cache} with a target: use width")
        if target < 1 or (width is not None and width < 1):
            raise ValueError(f"length reward target={target}, width={width}: wanted positive")
        return
    if width is not None:
        raise ValueError(f"length reward width={width} without a target: use cache")
    if longest is not None and not 0 <= cache <= longest:
        raise ValueError(
            f"length reward longest={longest}, cache={cache}: wanted 0 ≤ cache ≤ longest"
        )


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthReward(RewardSpec):
    """The number of tokens; see `length_reward`.

    Attributes:
      longest: the number of tokens from which the penalty is full.
      cache: over this many tokens before `longest` the penalty grows.
      target: the target length in tokens, instead of `longest`.
      width: distance from the target at which the penalty is full, tokens; None: `target`.
    """

    kind: str = "length"
    longest: int | None = None
    cache: int = 0
    target: int | None = None
    width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_length(self.longest, self.cache, self.target, self.width)

    def build(self, context: BuildContext) -> RewardFunction:
        """`length_reward` with these options."""
        return length_reward(
            longest=self.longest, cache=self.cache, target=self.target, width=self.width
        )
