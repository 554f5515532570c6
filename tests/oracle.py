"""Reads the reference vectors: TRL's tensors and weights as our batches and parameter trees.

The conversion of weight names here is independent of `jaxalign.hf`.
"""

import jax
import numpy as np
from safetensors.numpy import load_file

from jaxalign.models.base import DecoderConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer
from jaxalign.types import TokenBatch

DECODER = Decoder(
    DecoderConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=172,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=16,
        norm_eps=1e-6,
    )
)
SCORER = Scorer(DECODER)

_NAMES = {
    ("embed", "embedding"): "model.embed_tokens.weight",
    ("blocks", "attention_norm", "scale"): "model.layers.{}.input_layernorm.weight",
    ("blocks", "attention", "query", "kernel"): "model.layers.{}.self_attn.q_proj.weight",
    ("blocks", "attention", "key", "kernel"): "model.layers.{}.self_attn.k_proj.weight",
    ("blocks", "attention", "value", "kernel"): "model.layers.{}.self_attn.v_proj.weight",
    ("blocks", "attention", "out", "kernel"): "model.layers.{}.self_attn.o_proj.weight",
    ("blocks", "mlp_norm", "scale"): "model.layers.{}.post_attention_layernorm.weight",
    ("blocks", "mlp", "gate", "kernel"): "model.layers.{}.mlp.gate_proj.weight",
    ("blocks", "mlp", "up", "kernel"): "model.layers.{}.mlp.up_proj.weight",
    ("blocks", "mlp", "down", "kernel"): "model.layers.{}.mlp.down_proj.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head", "kernel"): "lm_head.weight",
    ("score", "kernel"): "score.weight",
}


def tree(weights, model, prefix=""):
    """Hugging Face tensors, matrices `[out, in]`, as the parameter tree of `model`."""

    def tensor(path, leaf):
        keys = tuple(key.key for key in path)
        name = prefix + _NAMES[keys]
        turn = (lambda x: x.T) if keys[-1] == "kernel" else (lambda x: x)
        if keys[0] != "blocks":
            value = turn(weights[name])
        else:
            value = np.stack([turn(weights[name.format(i)]) for i in range(leaf.shape[0])])
        assert value.shape == leaf.shape, keys
        return jax.numpy.asarray(value)

    return jax.tree_util.tree_map_with_path(tensor, model.shapes)


def load(path, model):
    """A safetensors file as the parameter tree of `model`."""
    return tree(load_file(path), model)


def rows(ids, attention, trained=None):
    """Token ids and masks as TRL passes them (`trained` aligned with ids) as a `TokenBatch`."""
    attention = np.asarray(attention).astype(bool)
    trained = attention if trained is None else np.asarray(trained).astype(bool)
    return TokenBatch(
        inputs=np.asarray(ids, np.int32),
        targets=_next(np.asarray(ids, np.int32)),
        positions=np.maximum(np.cumsum(attention, axis=1) - 1, 0).astype(np.int32),
        segment_ids=attention.astype(np.int32),
        loss_mask=_next(trained),
    )


def _next(x):
    return np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], axis=1)


def furthest(got, want):
    """The largest absolute difference between two parameter trees of one structure."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    gaps = jax.tree.map(
        lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), got, want
    )
    return max(jax.tree.leaves(gaps))
