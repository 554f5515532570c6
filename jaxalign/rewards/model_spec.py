"""A reward that a configuration names by a trained reward model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxalign.rewards.model import check_scale, model_reward
from jaxalign.rewards.other_tokenizer import retokenised_reward
from jaxalign.rewards.specs import (
    BuildContext,
    RewardFunction,
    RewardSpec,
    check_option,
    register_reward,
)
from jaxalign.types import Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxalign.models.scorer import Scorer


@register_reward
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelReward(RewardSpec):
    """A trained reward model.

    Attributes:
      source: folder or hub id.
      tokenizer: "policy": the model reads the policy's token ids; "own": it has its own tokenizer
        and chat template, and reads answers as text (see `retokenised_reward`).
      chat_template: with its own tokenizer: the template it was trained with; None: the
        tokenizer's.
      length: with its own tokenizer: maximum tokens of a conversation; None: the model's maximum.
      batch: with its own tokenizer: conversations per forward pass.
      attributes: attribute → weight, for a model with several scores: the weighted sum.
      shift: subtracted from the score.
      scale: divides the difference; > 0.
    """

    kind: str = "model"
    source: str
    tokenizer: str = "policy"
    chat_template: str | None = None
    length: int | None = None
    batch: int = 16
    attributes: dict[str, float] | None = None
    shift: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        known = ("policy", "own")
        check_option(self.tokenizer in known, "tokenizer", self.tokenizer, " or ".join(known))
        own = self.tokenizer == "own"
        for name, default in (("chat_template", None), ("length", None), ("batch", 16)):
            value = getattr(self, name)
            allowed = own or value == default
            check_option(allowed, name, value, f"{default!r} without tokenizer=own")
        long_enough = self.length is None or self.length > 1
        check_option(long_enough, "length", self.length, "2 or more, or null")
        check_option(self.batch > 0, "batch", self.batch, "positive")
        weights = self.attributes
        check_option(
            weights is None or any(weights.values()),
            "attributes",
            weights,
            "a weight other than 0 for at least one, or null",
        )
        check_scale(self.scale)

    def build(self, context: BuildContext) -> RewardFunction:
        """The model's score of tokens, or of text for a model with its own tokenizer."""
        scorer, params = (context.load or _load)(self)
        if self.tokenizer == "policy":
            check_same_tokens(context.tok, self.source)
            return model_reward(scorer, params, shift=self.shift, scale=self.scale)
        from jaxalign.hf import load_tokenizer

        return retokenised_reward(
            scorer,
            params,
            load_tokenizer(self.source),
            context.tok,
            rows=context.rows,
            chat_template=self.chat_template,
            length=self.length,
            batch=self.batch,
            shift=self.shift,
            scale=self.scale,
            name=context.name,
        )


LoadModel = Callable[[ModelReward], "tuple[Scorer, Params]"]
"""Loads a spec's reward model, with one score, onto the devices that are to hold it."""


def _load(spec: ModelReward) -> tuple[Scorer, Params]:
    from jaxalign.hf import load_reward_model

    return load_reward_model(spec.source, spec.attributes)


def check_same_tokens(tok: PreTrainedTokenizerBase, source: str) -> None:
    """Refuses a reward model whose tokenizer gives the policy's token ids another meaning.

    A reward model without tokenizer files is accepted unchecked.

    Raises:
      ValueError: a token with another id, or an ordinary token that the reward model lacks.
    """
    from jaxalign.hf import load_tokenizer

    try:
        scorer_vocab = load_tokenizer(source).get_vocab()
    except ValueError:
        return
    special = set(tok.all_special_tokens)
    for token, policy_id in tok.get_vocab().items():
        scorer_id = scorer_vocab.get(token)
        if scorer_id != policy_id and (scorer_id is not None or token not in special):
            raise ValueError(
                f"the reward model {source!r} has another tokenizer than the policy: {token!r} is "
                f"{policy_id} here and {scorer_id} there; let it read texts: rewards: [{{kind: "
                f"model, source: {source}, tokenizer: own}}]"
            )
