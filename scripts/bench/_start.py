"""Starting points of side-by-side runs: weights in Hugging Face form, and pairs as token ids."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from _job import Pairs

import jaxalign as ja
from jaxalign.commands import bench
from jaxalign.models.base import DecoderConfig

SIZES = {
    name: (s.vocab_size, s.hidden_size, s.num_layers, s.num_heads, s.intermediate_size)
    for name, s in bench.SIZES.items()
    if s.num_kv_heads == s.num_heads and not s.tie_embeddings
}
"""Llama shapes of the benchmarks: vocabulary, hidden, layers, heads, width of the MLP."""


def shape_of(size: str) -> DecoderConfig:
    """The shape of that name."""
    return bench.SIZES[size]


def random_llama(size: str, seed: int = 0) -> tuple[ja.Decoder, Any]:
    """A Llama with random weights, its head apart from the embedding."""
    model = ja.Decoder(shape_of(size))
    return model, model.init(jax.random.key(seed))


def save_start(
    algorithm: str, model: ja.Decoder, params: Any, folder: pathlib.Path, tok: Any = None
) -> str:
    """Writes the start of a reward model (a scalar head from key 0) or of DPO; gives the folder."""
    if not folder.exists():
        whole: Any = model
        if algorithm == "reward":
            whole, params = ja.with_scalar_head(model, params, jax.random.key(0))
        ja.save_pretrained(whole, params, folder, tokenizer=tok)
    return str(folder)


def read_pairs(source: pathlib.Path | str, tok: Any, length: int, chat_template: str) -> Pairs:
    """The pairs of a preference file as jaxalign's own data code encodes them, in their order."""
    batches = ja.preference_batches(
        [str(source)], tok, rows=1, length=length, shuffle=False, chat_template=chat_template
    )
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    prompts = []
    for batch in batches:
        for side, ids in zip((batch.chosen, batch.rejected), sides, strict=True):
            ids.append(side.inputs[0][side.segment_ids[0] > 0])
        # The first trained target is the first token after the prompt.
        prompts.append(int(np.argmax(batch.chosen.loss_mask[0])) + 1)
    return Pairs(*sides, np.array(prompts, np.int32))
