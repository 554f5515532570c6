"""The judge: a linear head on the SFT model's features, trained on pairs that no stage sees.

    score(x, y) = w · f(x, y),   w = argmin Σ (1 − w · (f(chosen) − f(rejected)))² + λ |w|²

f are hidden states from a middle layer of a frozen model: at the answer's last token, and averaged
over the answer. The judge tells which of two answers is better, and when PPO's own reward stops
agreeing with it. Nothing is trained against it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.chat import Encoded, encode_conversations
from jaxalign.data.examples import Conversation
from jaxalign.data.files import Row
from jaxalign.data.packing import best_fit, token_rows
from jaxalign.models.decoder import Decoder
from jaxalign.rewards.evaluation import wilson
from jaxalign.types import Params, RolloutBatch, TokenBatch

_ROWS, _WIDTH, _MOST = 4, 192, 8
"""Rows of a batch, tokens and answers of a row: one shape, so one program reads all."""


class Rate(NamedTuple):
    """A share of independent trials with its 95 % interval (Wilson).

    Attributes:
      share: 0 to 1.
      low: lower end.
      high: upper end.
      count: trials.
    """

    share: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, wins: float, count: int) -> Rate:
        """The rate for a number of wins; a tie is half a win."""
        return cls(wins / max(count, 1), *wilson(wins, count), count)


def lower_layers(model: Decoder, params: Params, depth: float) -> tuple[Decoder, Params]:
    """A model of the first layers of another one, with its final norm and head.

    Args:
      model: without adapters.
      params: its parameters; all but the layers are shared, not copied.
      depth: the fraction of layers to keep, 0 to 1; at least one layer.
    """
    config = model.config
    count = max(1, round(depth * config.num_layers))
    config = dataclasses.replace(
        config,
        num_layers=count,
        rope_layers=config.rope_layers[:count],
        window_layers=config.window_layers[:count],
    )
    blocks = jax.tree.map(lambda x: x[:count], params["blocks"])
    return dataclasses.replace(model, config=config), params | {"blocks": blocks}


class Features:
    """Hidden states of a frozen model, pooled over answers.

    Args:
      model: the language model, without adapters.
      params: its parameters.
      tok: its tokenizer.
      chat_template: as in `encode_conversations`.
      depth: the fraction of layers to run, from the first on, 0 to 1: middle layers tell the most
        about a whole answer, and cost less.
    """

    def __init__(
        self, model: Decoder, params: Params, tok: Any, chat_template: str | None, depth: float
    ):
        lower, self._params = lower_layers(model, params, depth)
        self._tok, self._template = tok, chat_template

        @jax.jit
        def pool(
            params: Params, tokens: TokenBatch, last: jax.Array
        ) -> tuple[jax.Array, jax.Array]:
            hidden = lower.apply(params, tokens.inputs, tokens.positions, tokens.segment_ids)
            hidden = hidden.astype(jnp.float32)
            # [B, S, T]: which columns belong to the answer of segment s.
            which = tokens.segment_ids[:, None] == jnp.arange(1, last.shape[1] + 1)[None, :, None]
            which = (which & tokens.loss_mask[:, None]).astype(jnp.float32)
            count = jnp.maximum(jnp.sum(which, axis=-1, keepdims=True), 1.0)
            mean = jnp.einsum("bst,btd->bsd", which, hidden) / count
            return jnp.take_along_axis(hidden, last[:, :, None], axis=1), mean

        self._pool = pool

    def encode(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Encoded]:
        """Prompts with their answers as tokens."""
        conversations = [
            Conversation(
                ({"role": "user", "content": prompt}, {"role": "assistant", "content": answer}),
                f"answer {number}",
                1,
            )
            for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), start=1)
        ]
        return encode_conversations(self._tok, conversations, self._template)

    def __call__(self, documents: Sequence[Encoded]) -> np.ndarray:
        """Features of each document's answer, float32 `[N, 2 D]`."""
        lengths = [len(document.ids) for document in documents]
        width = max([_WIDTH, *lengths])
        groups = best_fit(lengths, width, _MOST)
        found: dict[int, np.ndarray] = {}
        for start in range(0, len(groups), _ROWS):
            part = groups[start : start + _ROWS]
            last = np.zeros((_ROWS, _MOST), np.int32)
            for row, group in enumerate(part):
                ends = np.cumsum([lengths[i] for i in group])
                trained = [int(np.flatnonzero(documents[i].trained)[-1]) for i in group]
                last[row, : len(group)] = [
                    end - lengths[i] + at for end, i, at in zip(ends, group, trained, strict=True)
                ]
            tokens = token_rows(documents, part, _ROWS, width, 0)
            ends_of, means = map(np.asarray, self._pool(self._params, tokens, last))
            for row, group in enumerate(part):
                for place, i in enumerate(group):
                    found[i] = np.concatenate([ends_of[row, place], means[row, place]])
        return np.stack([found[i] for i in range(len(documents))])


@dataclasses.dataclass(frozen=True)
class Judge:
    """Scores answers.

    Attributes:
      features: features of the frozen model.
      weights: float32 `[2 D]`, for features divided by their spread.
      accuracy: the share of held-out pairs that it ranks correctly.
      by_kind: the same for each kind of rejected answer, as (right, pairs).
    """

    features: Features
    weights: np.ndarray
    accuracy: Rate
    by_kind: dict[str, tuple[int, int]]

    def scores(self, documents: Sequence[Encoded]) -> np.ndarray:
        """A score for each document, float32 `[N]`; differences between answers have a meaning."""
        return self.features(documents) @ self.weights

    def answers(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """A score for each answer."""
        return self.scores(self.features.encode(prompts, answers))


def train_judge(
    features: Features, rows: Sequence[Row], held_out: Sequence[Row], penalty: float
) -> Judge:
    """Fits the head on pairs and measures it on others.

    Args:
      features: features of the frozen model.
      rows: pairs with `prompt`, `chosen`, `rejected` and `kind`; no stage trains on them.
      held_out: the same, with other prompts.
      penalty: λ, for features whose squared norm is 1 on average.

    Raises:
      ValueError: no pairs.
    """
    if not rows or not held_out:
        raise ValueError(
            f"a judge of {len(rows)} pairs, tried on {len(held_out)}: wanted some of each"
        )
    # A prompt's chosen answer is in several pairs, but is read once.
    sides = [(row.data["prompt"], row.data[side]) for row in (*rows, *held_out) for side in _SIDES]
    answers = list(dict.fromkeys(sides))
    values = features(features.encode(*zip(*answers, strict=True)))
    number = {answer: i for i, answer in enumerate(answers)}
    trained = sorted({number[side] for side in sides[: 2 * len(rows)]})
    spread = values[trained].std(axis=0)
    scale = np.where(spread > 0, 1.0 / np.maximum(spread, 1e-12), 0.0)
    values = values * scale

    places = np.array([number[side] for side in sides]).reshape(-1, 2)
    differences = values[places[:, 0]] - values[places[:, 1]]
    weights = _ridge(differences[: len(rows)].astype(np.float64), penalty)
    margins = differences[len(rows) :] @ weights
    by_kind: dict[str, tuple[int, int]] = {}
    for row, margin in zip(held_out, margins, strict=True):
        right, pairs = by_kind.get(row.data["kind"], (0, 0))
        by_kind[row.data["kind"]] = right + int(margin > 0), pairs + 1
    accuracy = Rate.of(int(np.sum(margins > 0)), len(held_out))
    return Judge(features, (scale * weights).astype(np.float32), accuracy, by_kind)


_SIDES = ("chosen", "rejected")


def _ridge(differences: np.ndarray, penalty: float) -> np.ndarray:
    """The w of the module's equation, in its dual form: there are fewer pairs than features."""
    width = differences.shape[1]
    products = differences @ differences.T / width
    duals = np.linalg.solve(products + penalty * np.eye(len(products)), np.ones(len(products)))
    return differences.T @ duals / width


def win_rate(scores: np.ndarray, others: np.ndarray) -> Rate:
    """How often an answer beats the other model's to the same prompt; ties are half a win."""
    wins = float(np.sum(scores > others)) + 0.5 * float(np.sum(scores == others))
    return Rate.of(wins, len(scores))


def documents_of(batch: RolloutBatch) -> list[Encoded]:
    """The prompts with their sampled answers, of the rows that have one."""
    tokens = jax.device_get(batch.tokens)
    documents = []
    for inputs, targets, segments, trained in zip(
        tokens.inputs, tokens.targets, tokens.segment_ids, tokens.loss_mask, strict=True
    ):
        columns = np.flatnonzero(segments > 0)
        answer = np.flatnonzero(trained)
        if not answer.size:
            continue
        # Inputs and the last target: shift the mask of targets by one to get a mask of tokens.
        first, end = int(columns[0]), int(answer[-1])
        ids = np.concatenate([inputs[first : end + 1], targets[end : end + 1]])
        mask = np.concatenate([[False], trained[first : end + 1]])
        documents.append(Encoded(ids.astype(np.int32), mask))
    return documents
