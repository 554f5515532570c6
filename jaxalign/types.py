"""The pytrees that flow through jaxalign: named tuples of arrays.

A batch is built once by `jaxalign.data`, enriched by an algorithm's `prepare`, and consumed
by its `step`. Every leaf of a batch has the rows as its first axis, so that a batch can be
sharded over devices or cut into micro-batches without knowing which algorithm it belongs to.

Letters: B rows, T positions of a row, S sequences (documents, pairs) packed into a row,
P positions of a prompt, R positions of a response.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray
Params = Any
"""A plain nested dict of arrays."""


class Weighted(NamedTuple):
    """A sum and the weight to divide it by, once, after all parts are added.

    Averages of averages depend on how the work was split. A `Weighted` does not: the parts of
    a batch (micro-batches, devices, hosts) add up leaf by leaf, and `mean` divides at the end.

    Attributes:
      total: sum of weighted values.
      weight: sum of weights (a count of tokens, sequences or pairs).
    """

    total: Array
    weight: Array

    def mean(self) -> jax.Array:
        """`total / weight`; 0 if the weight is 0, so that an empty batch changes nothing."""
        weight = jax.numpy.asarray(self.weight, jax.numpy.float32)
        empty = weight <= 0  # False for NaN, so that a NaN weight shows in the result
        return jax.numpy.where(empty, 0, self.total / jax.numpy.where(empty, 1, weight))


class TrainState(NamedTuple):
    """All that an optimizer step reads and writes.

    Attributes:
      step: number of optimizer updates done, int32 scalar.
      params: the trained parameters, a nested dict; for PPO `{"policy": …, "critic": …}`.
      frozen: parameters that the forward pass also needs but that have no gradient: a dict with the
        same nesting, merged into `params` leaf by leaf (the base model under LoRA; `{}` otherwise).
      opt_state: the optax state for `params`.
    """

    step: Array
    params: Params
    frozen: Params
    opt_state: Any


class EmbeddingNoise(NamedTuple):
    """Uniform noise for the embeddings of a batch's tokens (NEFTune), all arrays `[B, T]`.

    Attributes:
      seeds: uint32, the seed of each token's random numbers; see `algorithms.neftune`.
      scale: float32, the noise's largest magnitude times √D, for embeddings of width D; 0 on
        padding.
    """

    seeds: Array
    scale: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowerStates:
    """The residual stream above a model's lowest layers, computed beforehand.

    Attributes:
      hidden: `[B, T, D]`, in the model's compute dtype. None, for a critic: the policy's.
      layers: how many layers it has passed; part of the program, not an array.
    """

    hidden: Array | None
    layers: int = dataclasses.field(metadata={"static": True})


class TokenBatch(NamedTuple):
    """Rows of tokens with their targets; several documents may share a row.

    The shift between inputs and targets is done once, when the row is built: `targets[b, t]`
    is the token after `inputs[b, t]` in the same document. At a document's last token, and on
    padding, there is no target: `loss_mask` is False there. All arrays are `[B, T]`.

    Attributes:
      inputs: int32 token ids.
      targets: int32 token ids that `inputs` should predict.
      positions: int32, from 0 in each document (rotary positions).
      segment_ids: int32, 0 on padding, 1, 2, … for the documents of a row. A token attends only to
        earlier tokens of its own segment.
      loss_mask: bool, True where `targets` is trained. Floats are an error: use `weights`.
      branch_ids: int32, which continuation of its segment a token belongs to: 0 for the shared
        part, 1, 2, … for its continuations. A token attends to branch 0 and to its own branch.
        None: no branches.
      source_ids: int32, which source of a mixture a token came from, from 0. None: not recorded.
      weights: float32 ≥ 0, the weight of each trained token in the likelihood (SFT, and PPO's `ptx`
        text): Σ w·ℓ / Σ w. None: 1 each. Losses on whole answers raise an error if it is set.
      noise: noise to add to the embeddings. None: no noise.
      experts: integers `[B, T, L, k]`, the k experts that each token takes in each layer of a
        mixture (router replay). None: the router chooses.
      lower: the model's hidden states above its lowest layers, which are then not run. None: they
        are run.
    """

    inputs: Array
    targets: Array
    positions: Array
    segment_ids: Array
    loss_mask: Array
    branch_ids: Array | None = None
    source_ids: Array | None = None
    weights: Array | None = None
    noise: EmbeddingNoise | None = None
    experts: Array | None = None
    lower: LowerStates | None = None


class PairBatch(NamedTuple):
    """Preference pairs.

    Unpacked (`mask` None): row b of `chosen` and row b of `rejected` form one pair, and the
    per-pair arrays are `[B]`. Packed: segment s (counted from 1) of row b in `chosen` and in
    `rejected` form one pair, and the per-pair arrays are `[B, S]`.

    Attributes:
      chosen: the preferred answers after their prompts; `loss_mask` marks the answer.
      rejected: the rejected answers, in the same form.
      ref_chosen_logps: float32 summed log-probability of the answer under the frozen reference;
        added by `dpo.make_prepare`.
      ref_rejected_logps: the same for the rejected answers.
      margin: float32, how much better the chosen answer is (reward loss with margin), or None.
      mask: bool `[B, S]`, which pairs exist in a packed row; its shape also tells S. None when
        every row is one pair.
      weights: float32 ≥ 0, how much a pair counts in the loss (DPO, reward): Σ w·ℓ / Σ w. None: 1.
    """

    chosen: TokenBatch
    rejected: TokenBatch
    ref_chosen_logps: Array | None = None
    ref_rejected_logps: Array | None = None
    margin: Array | None = None
    mask: Array | None = None
    weights: Array | None = None


class SharedPairBatch(NamedTuple):
    """Preference pairs whose prompt is stored once in the row, followed by both answers.

    Segment s (counted from 1) of row b is one pair. Branch 0 is the prompt without its last token.
    Branch 1 is that last token and the chosen answer; branch 2 is the last token again and the
    rejected answer. The positions in both branches continue from the prompt.

    Attributes:
      tokens: prompts and answers, with `branch_ids`; `loss_mask` marks both answers.
      ref_chosen_logps: float32 `[B, S]`, as in `PairBatch`.
      ref_rejected_logps: the same for the rejected answers.
      margin: float32 `[B, S]`, or None.
      mask: bool `[B, S]`, which pairs exist.
      weights: float32 `[B, S]`, or None, as in `PairBatch`.
    """

    tokens: TokenBatch
    ref_chosen_logps: Array | None = None
    ref_rejected_logps: Array | None = None
    margin: Array | None = None
    mask: Array | None = None
    weights: Array | None = None


class UnpairedBatch(NamedTuple):
    """Single answers marked as desirable or not (KTO).

    Attributes:
      tokens: prompts and answers, one per row, `[B, T]`; `loss_mask` marks the answer.
      desirable: bool `[B]`.
      mismatched: the same prompts, each with another row's answer; the KL between policy and
        reference is estimated on them.
      ref_logps: float32 `[B]`, summed log-probability of the answer under the reference.
      kl: float32 `[B]`, the KL from policy to reference, estimated over the whole batch (the same
        number in every row). `kto.make_prepare` adds it and `ref_logps`.
    """

    tokens: TokenBatch
    desirable: Array
    mismatched: TokenBatch
    ref_logps: Array | None = None
    kl: Array | None = None


class RankedBatch(NamedTuple):
    """Several answers to one prompt, in an order of preference.

    Attributes:
      answers: prompts with answers; every leaf is `[B, K, T]`, with K answers per prompt.
      ranks: float32 `[B, K]`, larger is better; equal ranks are not compared.
      mask: bool `[B, K]`, which answers exist.
    """

    answers: TokenBatch
    ranks: Array
    mask: Array


class GradedBatch(NamedTuple):
    """Answers with graded scores, such as helpfulness from 0 to 4.

    Attributes:
      tokens: prompts and answers, one per row, `[B, T]`.
      scores: float32 `[B, A]`, one column per attribute.
      mask: bool `[B, A]`, which scores were given.
    """

    tokens: TokenBatch
    scores: Array
    mask: Array


class StepBatch(NamedTuple):
    """Answers whose steps of reasoning are labelled (process rewards).

    Attributes:
      tokens: prompts and answers, one per row, `[B, T]`.
      labels: float32 `[B, T]` in [0, 1], at the last token of each step.
      mask: bool `[B, T]`, True at the last token of each labelled step.
    """

    tokens: TokenBatch
    labels: Array
    mask: Array


class PromptBatch(NamedTuple):
    """Prompts for a rollout, padded on the left so that all answers start in one column.

    Attributes:
      tokens: int32 `[B, P]`.
      mask: bool `[B, P]`, True on the prompt's tokens.
      index: int32 `[B]`, the prompt's row in `Batches.examples`, where reward functions find the
        row's other columns; -1 for an empty row.
    """

    tokens: Array
    mask: Array
    index: Array


class Scores(NamedTuple):
    """A reward's scores for a batch of answers.

    Attributes:
      values: float32 `[B]`.
      applies: bool `[B]`, False where the reward does not apply to a row; its value is then 0 and
        is not counted. None: the reward applies to every row.
      parts: name → scores of the rewards that `values` combines; None for a single reward.
    """

    values: Array
    applies: Array | None = None
    parts: dict[str, Scores] | None = None


class RolloutBatch(NamedTuple):
    """Sampled answers with everything a PPO update needs; made by `ppo.make_prepare`.

    Per-token arrays are `[B, T]` and aligned with `tokens.targets`: entry t belongs to the
    action of sampling `targets[b, t]` after `inputs[b, :t + 1]`.

    Attributes:
      tokens: prompts and answers; `loss_mask` marks the answer's tokens, stop token included.
      old_logprobs: log π_old of the targets, computed by the trainer (not the sampler), float32.
      ref_logprobs: the same under the frozen reference policy.
      old_values: the critic's values before the update. None, like `returns`, without a critic.
      advantages: per-token advantages, whitened if configured.
      returns: advantages before whitening, plus old values.
      value_mask: bool, where the critic is trained: `loss_mask`, plus one position when the score
        is placed after the stop token. None: `loss_mask`.
      rewards: float32 per-token reward before any whitening: −β·KL, and the score at its position.
      scores: float32 `[B]`, the reward function's score after penalties.
      sampler_logprobs: log-probabilities recorded while sampling, to be compared with
        `old_logprobs`.
      finished: bool `[B]`, whether the answer ended with a stop token.
      valid: bool `[B]`, False for empty rows that fill up a batch.
      answer_mask: bool, the tokens of all answers, if some answers are left out of `loss_mask`.
        None: `loss_mask`.
      scaled_scores: float32 `[B]`, the scores as they enter the rewards, after normalisation and
        clipping. None: `scores`.
      temperature: float32 `[B]`, the sampling temperature, the same in every row. None: the
        configured one.
      kl_coef: float32 `[B]`, β of the KL term of the loss, the same in every row. None: the
        configured one.
      ptx: rows of text whose likelihood is part of the loss. None: no such term.
      reward_parts: name → the scores of each of several rewards, before weights and penalties.
      non_score_rewards: float32 `[B]`, −β Σ_t kl_t: the sum of an answer's rewards without its
        score. None: rewards minus scores.
      columns: int32 `[B, Q]`, the columns whose hidden states an update reads, among them all of
        its masks. None: all columns.
      critic_lower: `tokens.lower` of the critic. None: an update runs all of its layers.
    """

    tokens: TokenBatch
    old_logprobs: Array
    ref_logprobs: Array
    old_values: Array | None
    advantages: Array
    returns: Array | None
    value_mask: Array | None = None
    rewards: Array | None = None
    scores: Array | None = None
    sampler_logprobs: Array | None = None
    finished: Array | None = None
    valid: Array | None = None
    answer_mask: Array | None = None
    scaled_scores: Array | None = None
    temperature: Array | None = None
    kl_coef: Array | None = None
    ptx: TokenBatch | None = None
    reward_parts: dict[str, Scores] | None = None
    non_score_rewards: Array | None = None
    columns: Array | None = None
    critic_lower: LowerStates | None = None
