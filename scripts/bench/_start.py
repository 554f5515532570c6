"""Starting points of side-by-side runs: weights in Hugging Face form, and pairs as token ids."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
from _job import Pairs

import jaxalign as ja
from jaxalign.models.base import DecoderConfig

SIZES = {"S": (8192, 256, 4, 4, 688), "M": (32000, 512, 8, 8, 1376)}
"""Llama shapes of the benchmarks: vocabulary, hidden, layers, heads, width of the MLP."""


def random_llama(size: str, seed: int = 0) -> tuple[ja.Decoder, Any]:
    """A Llama with random weights, its head apart from the embedding."""
    vocab, hidden, layers, heads, inner = SIZES[size]
    config = DecoderConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        tie_embeddings=False,
    )
    model = ja.Decoder(config)
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
