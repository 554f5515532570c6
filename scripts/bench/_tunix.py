"""Tunix's Llama for the side-by-side runs, with weights of its own of the same shape."""

from __future__ import annotations

from typing import Any

import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama


def random_llama(shape: tuple[int, int, int, int, int]) -> nnx.Module:
    """vocabulary, hidden, layers, heads, width of the MLP → a model with random weights."""
    vocab, hidden, layers, heads, inner = shape
    config = llama.ModelConfig(
        num_layers=layers,
        vocab_size=vocab,
        embed_dim=hidden,
        hidden_dim=inner,
        num_heads=heads,
        head_dim=hidden // heads,
        num_kv_heads=heads,
        rope_theta=10000,
        norm_eps=1e-6,
    )
    built = getattr(llama, "Llama3")(config, rngs=nnx.Rngs(0))  # noqa: B009
    # It starts with an MLP of zeros, whose products some libraries make faster than others'.
    rng = np.random.default_rng(0)

    def fill(variable: Any) -> Any:
        value = np.asarray(variable.value)
        return variable.replace(rng.normal(0, 0.02, value.shape).astype(np.float32))

    state = nnx.state(built, nnx.Param)
    leaf = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    import jax

    nnx.update(built, jax.tree.map(fill, state, is_leaf=leaf))
    return built
