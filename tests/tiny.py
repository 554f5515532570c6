"""Tiny models with weights that matter, and rows laid out from documents by plain numpy.

Nothing here uses jaxalign's data room: these rows are an independent statement of the layout in
`jaxalign.types`.
"""

import dataclasses

import jax
import numpy as np

from jaxalign.models.base import DecoderConfig, RopeConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.types import TokenBatch

VOCAB = 64

CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
)
BIASED = dataclasses.replace(
    CONFIG,
    tie_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    rope=RopeConfig(
        theta=500.0, kind="llama3", factor=4.0, high_freq_factor=3.0, original_max_positions=32
    ),
)

DECODER = Decoder(CONFIG)
SCORER = Scorer(DECODER)


def random_params(model, seed=0):
    """Weights of order 1/√fan_in, norms around 1, small biases: every parameter has an effect."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kind = path[-1].key
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if kind == "scale":
            return 1 + 0.2 * noise
        if kind == "bias":
            return 0.1 * noise
        if kind == "embedding":
            return 0.5 * noise
        return noise / np.sqrt(np.float32(leaf.shape[-2]))

    return jax.tree.map(jax.numpy.asarray, jax.tree_util.tree_map_with_path(draw, model.shapes))


def document(rng, length, prompt=None):
    """One document as per-token arrays: ids, what follows them, and which of that is trained."""
    ids = rng.integers(3, VOCAB, length).astype(np.int32)
    prompt = int(rng.integers(1, length)) if prompt is None else prompt
    following = np.append(ids[1:], 0).astype(np.int32)
    trained = (np.arange(length) >= prompt - 1) & (np.arange(length) < length - 1)
    return {"inputs": ids, "targets": following, "loss_mask": trained}


def lay(documents, groups, length, *, left=False):
    """Documents into rows, as a dict of `[B, length]` arrays.

    Args:
      documents: dicts of per-token arrays, all with the same keys.
      groups: which documents each row holds, in order; an empty list is an empty row.
      length: columns.
      left: push the documents of a row to its right end.
    """
    rows = {
        name: np.zeros((len(groups), length), value.dtype) for name, value in documents[0].items()
    }
    rows["positions"] = np.zeros((len(groups), length), np.int32)
    rows["segment_ids"] = np.zeros((len(groups), length), np.int32)
    for row, group in enumerate(groups):
        sizes = [len(documents[which]["inputs"]) for which in group]
        start = length - sum(sizes) if left else 0
        for segment, (which, size) in enumerate(zip(group, sizes, strict=True), start=1):
            here = slice(start, start + size)
            for name, value in documents[which].items():
                rows[name][row, here] = value
            rows["positions"][row, here] = np.arange(size)
            rows["segment_ids"][row, here] = segment
            start += size
    return rows


def token_batch(rows):
    """The `TokenBatch` among laid-out rows."""
    return TokenBatch(**{name: rows[name] for name in TokenBatch._fields if name in rows})


def alone(count, rows=None):
    """Groups for one document a row, with empty rows up to `rows`."""
    rows = count if rows is None else rows
    return [[i] if i < count else [] for i in range(rows)]


def spoil(batch, rng):
    """A `TokenBatch` with nonsense wherever nothing is to be read."""
    empty = batch.segment_ids == 0
    untrained = ~batch.loss_mask
    noise = rng.integers(0, VOCAB, batch.inputs.shape).astype(np.int32)
    return batch._replace(
        inputs=np.where(empty, noise, batch.inputs),
        targets=np.where(untrained, noise, batch.targets),
        positions=np.where(empty, noise, batch.positions),
    )
