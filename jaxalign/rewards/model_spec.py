"""A reward from a trained reward model that a config names."""

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
      adapter: True: the source must be an adapter with a score head (PEFT) on the same base as the
        policy's adapters; both share the base in memory. False: an adapter shares the base if it
        can, and a whole model is loaded separately.
      tokenizer: "policy": the model reads the policy's token ids; "own": it has its own tokenizer
        and chat template, and reads answers as text (see `retokenised_reward`).
      chat_template: a template other than the policy's: the model reads text rendered with it, as
        with tokenizer "own". "policy": the model reads the policy's tokens, whatever template its
        folder has. None: with tokenizer "own", its tokenizer's template; otherwise its folder's
        template, if there is one, must render conversations as the policy's does.
      length: for models that read text: maximum tokens of a conversation; None: the model's
        maximum.
      batch: for models that read text: conversations per forward pass.
      attributes: attribute → weight, for a model with several scores: the weighted sum.
      shift: is subtracted from the score.
      scale: divides the difference; > 0.
    """

    kind: str = "model"
    source: str
    adapter: bool = False
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
        for name, default in (("length", None), ("batch", 16)):
            value = getattr(self, name)
            allowed = self.reads_text or value == default
            check_option(allowed, name, value, f"{default!r} without tokenizer=own")
        forced = self.tokenizer == "own" and self.chat_template == "policy"
        check_option(not forced, "chat_template", "policy", "another with tokenizer=own")
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

    @property
    def reads_text(self) -> bool:
        """Whether the model reads conversations as text, under a template of its own."""
        return self.tokenizer == "own" or self.chat_template not in (None, "policy")

    def build(self, context: BuildContext) -> RewardFunction:
        """The model's score of tokens, or of text for a model with its own tokenizer."""
        if self.adapter and context.load is None:
            raise ValueError("adapter=true: wanted false, there is no policy whose base it shares")
        scorer, params = (context.load or _load)(self)
        if not self.reads_text:
            check_same_tokens(context.tok, self.source)
            if self.chat_template is None:
                check_same_template(context.tok, context.chat_template, self.source)
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
"""Loads a spec's reward model, with one score, onto its devices."""


def _load(spec: ModelReward) -> tuple[Scorer, Params]:
    from jaxalign.hf import load_reward_model

    return load_reward_model(spec.source, spec.attributes)


def check_same_tokens(tok: PreTrainedTokenizerBase, source: str) -> None:
    """Raises ValueError if a reward model's tokenizer disagrees with the policy's token ids.

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


def check_same_template(
    tok: PreTrainedTokenizerBase, chat_template: str | None, source: str
) -> None:
    """Raises ValueError if a reward model's chat template renders a conversation differently.

    A reward model without tokenizer files, or without a template, is accepted unchecked.

    Args:
      tok: the policy's tokenizer.
      chat_template: the policy's; None: its tokenizer's.
      source: the reward model's source.

    Raises:
      ValueError: the renderings differ; the message shows both.
    """
    from jaxalign.hf import load_tokenizer

    try:
        scorer_tok = load_tokenizer(source)
    except ValueError:
        return
    if not scorer_tok.chat_template:
        return
    for turns in _PROBES:
        policy, scorer = _read(tok, chat_template, turns), _read(scorer_tok, None, turns)
        if policy is None or scorer is None or policy == scorer:
            continue
        raise ValueError(
            f"the reward model {source!r} has another chat template than the policy. Of the same "
            f"conversation it reads {scorer!r}, and the policy reads and writes {policy!r}. Pass "
            f"text between them by rewards: [{{kind: model, source: {source}, tokenizer: own}}] "
            "(or chat_template: its template), or let it read the policy's form by chat_template: "
            "policy"
        )


_PROBES = (
    (("user", "Say it"), ("assistant", "Yes")),
    (("system", "Be brief"), ("user", "Say it"), ("assistant", "Yes")),
    (("user", "Say it"), ("assistant", "Yes"), ("user", "Again"), ("assistant", "No")),
)


def _read(
    tok: PreTrainedTokenizerBase, chat_template: str | None, turns: tuple[tuple[str, str], ...]
) -> str | None:
    """A conversation's text up to the end of its last answer; None if the template rejects it."""
    from jaxalign.data.chat import encode_conversations
    from jaxalign.data.examples import Conversation

    messages = tuple({"role": role, "content": content} for role, content in turns)
    try:
        (document,) = encode_conversations(
            tok, [Conversation(messages, "chat template", len(turns) - 1)], chat_template
        )
    except ValueError:
        return None
    end = int(document.trained.nonzero()[0][-1]) + 1
    return str(tok.decode(document.ids[:end].tolist()))
