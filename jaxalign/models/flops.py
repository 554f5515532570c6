"""Model FLOPs: the FLOPs of a step's mathematics, not of the compiled program.

With N matrix weights (of experts, only those that a token takes), a forward pass takes

    2 · N · tokens + 4 · heads · head_dim · pairs,

where `pairs` counts unmasked pairs of a query and a key. A step costs 3 forward passes; with frozen
weights under adapters, 2, of which layers below all adapters take only the first. Recomputed
activations, padding and masked pairs do not count, so that the same data gives the same number in
any layout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxalign.models.base import DecoderConfig
from jaxalign.types import PromptBatch, TokenBatch


class Work(NamedTuple):
    """The amount of data that a model reads. Entries add up (`add`).

    Attributes:
      tokens: tokens, without padding.
      pairs: pairs of a query and a key that it attends to, including itself.
      trained: tokens for which the vocabulary head is computed.
    """

    tokens: float = 0.0
    pairs: float = 0.0
    trained: float = 0.0

    def add(self, other: Work) -> Work:
        """Both together."""
        return Work(*(a + b for a, b in zip(self, other, strict=True)))


def work_of(batch: Any) -> Work:
    """The work in all `TokenBatch`es (and prompts) of a batch of any kind of arrays."""
    if isinstance(batch, TokenBatch):
        # A token at position t of its document or branch attends to t + 1 tokens.
        real = np.asarray(batch.segment_ids) > 0
        seen = np.asarray(batch.positions)[real] + 1.0
        return Work(float(real.sum()), float(seen.sum()), float(np.sum(batch.loss_mask)))
    if isinstance(batch, PromptBatch):
        lengths = np.asarray(batch.mask).sum(-1, dtype=np.float64)
        return Work(float(lengths.sum()), float((lengths * (lengths + 1) / 2).sum()))
    total = Work()
    for part in batch if isinstance(batch, tuple) else ():
        total = total.add(work_of(part))
    return total


def forward_flops(
    config: DecoderConfig, work: Work, *, head: bool = True, layers: int | None = None
) -> float:
    """FLOPs of one forward pass.

    Args:
      config: shape of the model.
      work: the data it reads.
      head: whether to count the vocabulary head, for the trained tokens.
      layers: how many layers to count; None: all.
    """
    layers = config.num_layers if layers is None else layers
    width, inner = config.hidden_size, config.intermediate_size
    heads, shared = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * width * inner
    if config.num_experts:
        mlp = mlp * config.experts_per_token + width * config.num_experts
    layer = 2 * (2 * width * heads + 2 * width * shared + mlp)
    body = layers * (layer * work.tokens + 4 * heads * work.pairs)
    return body + (2.0 * width * config.vocab_size * work.trained if head else 0.0)


def row_flops(config: DecoderConfig, rows: int, length: int, *, head: bool) -> float:
    """`forward_flops` of full rows with one document per row and every token trained."""
    return forward_flops(config, full_rows(rows, length), head=head)


def full_rows(rows: int, length: int) -> Work:
    """The work in full rows with one document per row and every token trained."""
    tokens = float(rows * length)
    return Work(tokens, tokens * (length + 1) / 2, tokens)


def decode_flops(config: DecoderConfig, prompts: Work, rows: int, prompt: int, new: int) -> float:
    """FLOPs of reading prompts once and generating `new` tokens for each of `rows` answers.

    Args:
      config: shape of the model.
      prompts: the work in the prompts.
      rows: answers.
      prompt: tokens of each answer's prompt.
      new: tokens of each answer.
    """
    seen = new * prompt + new * (new + 1) / 2
    written = Work(rows * new, rows * seen, rows * new)
    return forward_flops(config, prompts.add(written))


def update_flops(model: Any, batch: Any, *, frozen: bool = False, head: bool = True) -> float:
    """FLOPs of one update: forward, and the gradients of activations and of trained weights."""
    return training_flops(model, work_of(batch), frozen=frozen, head=head)


def training_flops(
    model: Any, work: Work, *, frozen: bool, head: bool, keep_lower_states: bool = False
) -> float:
    """`update_flops` of so much work.

    Args:
      model: the model.
      work: the data it reads.
      frozen: whether only adapters are trained.
      head: whether to count the vocabulary head.
      keep_lower_states: the layers below all adapters were run before.
    """
    whole = forward_flops(model.config, work, head=head)
    if not frozen:
        return 3 * whole
    return 2 * whole - (2 if keep_lower_states else 1) * below_adapters(model, work)


def below_adapters(model: Any, work: Work) -> float:
    """FLOPs of a forward pass through the layers below all adapters."""
    layers = getattr(model, "frozen_layers", 0)
    return forward_flops(model.config, work, head=False, layers=layers)


class PPOFlops(NamedTuple):
    """FLOPs of one iteration of PPO.

    Attributes:
      rollout: reading prompts and generating answers.
      scoring: reward models, log-probabilities of policy and reference, values of the critic.
      update: all epochs.
    """

    rollout: float
    scoring: float
    update: float

    @property
    def total(self) -> float:
        """All three."""
        return sum(self)


def ppo_flops(
    tokens: TokenBatch,
    policy: Any,
    critic: Any | None,
    scorers: list[Any],
    *,
    epochs: int,
    samples: int = 1,
    frozen: bool = False,
    shared_critic: bool = False,
    shared_prompts: bool = False,
    keep_lower_states: bool = False,
    shared_reference: bool = False,
) -> PPOFlops:
    """FLOPs of the iteration that generates a rollout and trains on it.

    Args:
      tokens: prompts and answers, as in the rollout of `ppo.make_prepare`.
      policy: the policy; the reference has its shape.
      critic: the critic, or None.
      scorers: the reward models.
      epochs: passes over the rollout.
      samples: answers per prompt; each prompt is read once.
      frozen: whether only the policy's adapters are trained.
      shared_critic: the critic is a head on the policy.
      shared_prompts: policy, reference and critic also read each prompt once in their passes over
        the rollout, as in mini-batches of whole groups.
      keep_lower_states: layers below all adapters are not run in updates.
      shared_reference: nor in the reference's pass.
    """
    whole, mask = work_of(tokens), np.asarray(tokens.loss_mask)
    read = (np.asarray(tokens.segment_ids) > 0) & ~mask
    again = np.asarray(tokens.positions)[read] + 1.0
    part = 1 - 1 / samples
    written = Work(
        whole.tokens - part * read.sum(), whole.pairs - part * again.sum(), whole.trained
    )
    passed = written if shared_prompts else whole
    one = forward_flops(policy.config, passed)
    apart = critic is not None and not shared_critic
    adapted = getattr(getattr(critic, "base", None), "lora", None) is not None
    values = forward_flops(critic.config, passed, head=False) if apart else 0.0
    update = training_flops(
        policy, passed, frozen=frozen, head=True, keep_lower_states=keep_lower_states
    )
    if apart:
        update += training_flops(
            critic, passed, frozen=adapted, head=False, keep_lower_states=keep_lower_states
        )
    once = below_adapters(policy, passed) if shared_reference else 0.0
    scored = sum(forward_flops(scorer.config, whole, head=False) for scorer in scorers)
    return PPOFlops(
        rollout=forward_flops(policy.config, written),
        scoring=scored + 2 * one - once + values,
        update=epochs * update,
    )
