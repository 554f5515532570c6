"""NEFTune: uniform noise on the embeddings while fine-tuning.

    X ← X + α / √(L·D) · ε,   ε ~ Uniform(−1, 1)

(Jain et al. 2023, https://arxiv.org/abs/2310.05914, algorithm 1), with L the tokens of the document
and D the width of an embedding. L does not count padding or the row's other documents.

The noise of a token depends only on the update's seed, its document's tokens and its position.
Padding, packing, micro-batches and devices therefore do not change it. Documents with the same
tokens get the same noise within an update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxalign.types import EmbeddingNoise, TokenBatch


def add_noise(batch: TokenBatch, alpha: float, seed: Sequence[int]) -> TokenBatch:
    """Adds noise for the embeddings to a batch.

    Args:
      batch: `[B, T]` arrays in numpy, padded or packed.
      alpha: α; the paper uses 5, 10 and 15.
      seed: non-negative integers, such as the run's seed and the update's number.
    """
    segments = np.asarray(batch.segment_ids)
    base = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)
    # One number for each document of each row; 0 is padding.
    document = segments + (segments.max(initial=0) + 1) * np.arange(len(segments))[:, None]
    count = int(document.max(initial=0)) + 1
    lengths = np.bincount(document.ravel(), minlength=count)[document]
    position = np.asarray(batch.positions).astype(np.uint64)
    tokens = _mix(_mix(position) + np.asarray(batch.inputs).astype(np.uint64))
    sums = np.zeros(count, np.uint64)
    np.add.at(sums, document, tokens)  # the sum wraps around, so its order does not matter
    seeds = _mix(_mix(sums[document] + base) + position) >> np.uint64(32)
    scale = np.where(segments > 0, alpha / np.sqrt(np.maximum(lengths, 1)), 0.0)
    noise = EmbeddingNoise(seeds.astype(np.uint32), scale.astype(np.float32))
    return batch._replace(noise=noise)


def _mix(x: Any) -> Any:
    """A bijection of uint64 whose outputs look random (Steele et al. 2014, SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
