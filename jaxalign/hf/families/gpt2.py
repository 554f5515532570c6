"""GPT-2: learned positions, LayerNorm, an MLP without gate, matrices stored `[in, out]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.hf.families.fields import read_activation
from jaxalign.hf.families.table import Entry, Family, Part
from jaxalign.hf.families.values import flag, integer, number, refuse
from jaxalign.models.base import DecoderConfig


def _thirds(config: DecoderConfig) -> tuple[int, int, int]:
    return (config.hidden_size,) * 3


def _rows(prefix: str) -> tuple[Entry, ...]:
    layer = prefix + "h.{}."
    rows = [
        Entry("embed/embedding", prefix + "wte.weight"),
        Entry("embed/positions", prefix + "wpe.weight"),
        Entry("norm/scale", prefix + "ln_f.weight"),
        Entry("norm/bias", prefix + "ln_f.bias"),
    ]
    for param, tensor in {"attention_norm": "ln_1", "mlp_norm": "ln_2"}.items():
        rows.append(Entry(f"blocks/{param}/scale", f"{layer}{tensor}.weight"))
        rows.append(Entry(f"blocks/{param}/bias", f"{layer}{tensor}.bias"))
    for param, tensor in {
        "attention/out": "attn.c_proj",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    }.items():
        rows.append(Entry(f"blocks/{param}/kernel", f"{layer}{tensor}.weight"))
        rows.append(Entry(f"blocks/{param}/bias", f"{layer}{tensor}.bias"))
    for i, param in enumerate(("query", "key", "value")):
        path, name = f"blocks/attention/{param}", f"{layer}attn.c_attn"
        rows.append(Entry(f"{path}/kernel", f"{name}.weight", part=Part(1, _thirds, i)))
        rows.append(Entry(f"{path}/bias", f"{name}.bias", part=Part(0, _thirds, i)))
    return tuple(rows)


def _read(hf: Mapping[str, Any]) -> DecoderConfig:
    refuse(hf, "add_cross_attention", "false", harmless=(False,))
    hidden, heads = integer(hf, "n_embd"), integer(hf, "n_head")
    if hidden % heads:
        raise ValueError(f"config.json: n_embd={hidden} is not a multiple of n_head={heads}")
    return DecoderConfig(
        vocab_size=integer(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer(hf, "n_inner", 4 * hidden),
        num_layers=integer(hf, "n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        norm="layer",
        norm_eps=number(hf, "layer_norm_epsilon", ""),
        tie_embeddings=flag(hf, "tie_word_embeddings"),
        max_positions=integer(hf, "n_positions"),
        learned_positions=True,
        activation=read_activation(hf, "activation_function"),
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        query_scale=None if flag(hf, "scale_attn_weights") else 1.0,
        query_scale_by_layer=flag(hf, "scale_attn_by_inverse_layer_idx"),
    )


def _write(config: DecoderConfig) -> dict[str, Any]:
    names = {"gelu_tanh": "gelu_new"}
    return {
        "vocab_size": config.vocab_size,
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "activation_function": names.get(config.activation, config.activation),
        "scale_attn_weights": config.query_scale is None,
        "scale_attn_by_inverse_layer_idx": config.query_scale_by_layer,
    }


GPT2 = Family(
    model_type="gpt2",
    causal="GPT2LMHeadModel",
    scorer="GPT2ForSequenceClassification",
    table=(
        Entry("head/kernel", "lm_head.weight", transpose=True),
        Entry("score/kernel", "score.weight", transpose=True),
        *_rows("transformer."),
        *_rows(""),  # OpenAI's checkpoints have no prefix
    ),
    read=_read,
    write=_write,
    # Causal masks that old versions saved.
    ignored=("*h.*.attn.bias", "*h.*.attn.masked_bias"),
    defaults={
        "n_positions": 1024,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "scale_attn_weights": True,
    },
)
