"""From the `rewards:` of a configuration to one reward function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.parallel.sharding import local_rows, mesh_of
from jaxalign.rewards.cases import Rows
from jaxalign.rewards.combine import combine_rewards
from jaxalign.rewards.model_spec import LoadModel
from jaxalign.rewards.specs import BuildContext, RewardFunction, RewardSpec
from jaxalign.rewards.text import TextReward
from jaxalign.types import PromptBatch, Scores, TokenBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_reward(
    specs: Sequence[RewardSpec],
    tok: PreTrainedTokenizerBase,
    *,
    rows: Any = None,
    load: LoadModel | None = None,
    chat_template: str | None = None,
) -> Callable[[TokenBatch, PromptBatch], Scores]:
    """The reward function that a configuration describes: the weighted sum of all of `specs`.

    Before training starts, this checks that every row has what the rewards need (a right answer,
    known instructions).

    Args:
      specs: at least one; their names (by default their kinds) must differ.
      tok: the policy's tokenizer.
      rows: see `jaxalign.rewards.text_reward`.
      load: loads reward models; None: onto the default device.
      chat_template: the policy's; None: its tokenizer's.

    Raises:
      ValueError: no specs, two specs with the same name, a function that does not exist, a reward
        model with another tokenizer or chat template than the policy's, or a row that lacks what a
        reward needs.
    """
    rewards: dict[str, RewardFunction] = {}
    weights: dict[str, float] = {}
    for spec in specs:
        name = spec.kind if spec.name is None else spec.name
        if name in rewards:
            raise ValueError(f"two rewards are called {name!r}; give them names: name: …")
        weights[name] = spec.weight
        context = BuildContext(
            tok=tok, rows=rows, name=name, load=load, chat_template=chat_template
        )
        reward = spec.build(context)
        rewards[name] = reward if spec.where is None else _restrict(reward, spec, rows, name)
    return combine_rewards(rewards, weights)


def _restrict(reward: RewardFunction, spec: RewardSpec, rows: Any, name: str) -> RewardFunction:
    """The reward, applied only to rows that have the values of `spec.where`."""
    if rows is None:
        raise ValueError(f"reward {name!r} where={spec.where}: there are no rows to look at")
    applies = np.array([spec.applies_to(row) for _, row in Rows(rows).all()], np.bool_)
    if not applies.any():
        raise ValueError(f"reward {name!r} where={spec.where}: no row has these")
    if isinstance(reward, TextReward):
        return reward.only(lambda case: spec.applies_to(case.row))

    def restricted(tokens: TokenBatch, prompts: PromptBatch) -> Scores:
        mesh = mesh_of((tokens, prompts))
        index = np.asarray(local_rows(prompts.index, mesh))  # [B], -1 for padding rows
        scores = local_rows(reward(tokens, prompts), mesh)
        return Scores(scores, applies[np.maximum(index, 0)] & (index >= 0))

    return restricted
