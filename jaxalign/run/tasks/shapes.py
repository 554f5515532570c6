"""Batches of data as shapes, for each kind of data, without reading any.

The shapes come from an empty batch, built by the same function as real ones. Its zeros are never
touched, so even a large batch takes no memory.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.data.packing import prompt_rows, token_rows
from jaxalign.run.config.base import Run
from jaxalign.run.config.data import DataConfig
from jaxalign.run.config.sft import SFTRun
from jaxalign.types import EmbeddingNoise, PairBatch, PromptBatch, TokenBatch


def as_shapes(tree: Any) -> Any:
    """Arrays → their shapes and dtypes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def array(*shape: int, dtype: Any = jnp.float32) -> Any:
    """An array as a shape; float32 by default."""
    return jax.ShapeDtypeStruct(shape, dtype)


def token_shapes(data: DataConfig) -> TokenBatch:
    """Rows of documents, `[B, T]`."""
    return as_shapes(token_rows((), [()] * data.rows, data.rows, data.length, 0))


def text_shapes(config: Run) -> TokenBatch:
    """What SFT reads."""
    tokens = token_shapes(config.data)
    if not isinstance(config, SFTRun) or config.sft.neftune_alpha is None:
        return tokens
    shape = tokens.inputs.shape
    return tokens._replace(noise=EmbeddingNoise(array(*shape, dtype=jnp.uint32), array(*shape)))


def pair_shapes(config: Run) -> PairBatch:
    """What DPO reads. Only the data tells how many pairs a packed row holds, so one is assumed."""
    side = token_shapes(config.data)
    mask = array(config.data.rows, 1, dtype=jnp.bool_) if config.data.packing else None
    return PairBatch(side, side, mask=mask)


def prompt_shapes(config: Run) -> PromptBatch:
    """What a rollout reads, `[B, P]`."""
    return as_shapes(prompt_rows({}, [], config.data.rows, config.data.length, 0))


def full_batch(shapes: Any, rows: int | None = None) -> Any:
    """A batch on the host with one document of maximum length in each row.

    Args:
      shapes: the batch's shapes.
      rows: another number of rows, for quantities proportional to rows.
    """

    def fill(x: Any) -> Any:
        if isinstance(x, TokenBatch):
            shape = x.inputs.shape if rows is None else (rows, *x.inputs.shape[1:])
            positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
            ids = np.zeros(shape, np.int32)
            full = TokenBatch(ids, ids, positions, np.ones(shape, np.int32), np.ones(shape, bool))
            noise = jax.tree.map(lambda y: np.zeros(shape, y.dtype), x.noise)
            return full._replace(noise=noise)
        shape = x.shape if rows is None else (rows, *x.shape[1:])
        return np.ones(shape, x.dtype) if x.dtype == jnp.bool_ else np.zeros(shape, x.dtype)

    return jax.tree.map(fill, shapes, is_leaf=lambda x: isinstance(x, TokenBatch))
