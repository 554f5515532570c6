"""For every family: what `config.json` of a small model with all its features turned on holds."""

SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 3.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.0, 4.0],
}
WINDOW = {"sliding_window": 5}
GEMMA = {
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 1.5,
    "attention_bias": True,
}
MIXED = {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}

CASES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "smollm3": WINDOW
    | {"use_sliding_window": True, "no_rope_layer_interval": 2, "attention_bias": True},
    "mistral": WINDOW | {"head_dim": 16, "max_position_embeddings": 12, "rope_parameters": DYNAMIC},
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": WINDOW
    | MIXED
    | {
        "use_sliding_window": True,
        "head_dim": 16,
        "attention_bias": True,
        "rope_parameters": YARN | {"mscale": 1.5, "mscale_all_dim": 0.5, "truncate": False},
    },
    "gemma2": WINDOW | GEMMA,
    "gemma3_text": WINDOW
    | MIXED
    | GEMMA
    | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "phi3": WINDOW | {"original_max_position_embeddings": 12, "rope_parameters": LONGROPE},
    "olmo2": {"attention_bias": True, "rope_parameters": YARN},
    "gpt2": {
        "vocab_size": 48,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_inner": 40,
        "n_positions": 32,
        "scale_attn_by_inverse_layer_idx": True,
        "scale_attn_weights": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mixtral": WINDOW | {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": WINDOW
    | {
        "use_sliding_window": True,
        "head_dim": 16,
        "attention_bias": True,
        "num_experts": 6,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": False,
    },
}
"""`model_type` → its keys beside `SMALL`; GPT-2 has names of its own for all of them."""


def keys(kind):
    """All keys of a family."""
    return CASES[kind] if kind == "gpt2" else SMALL | CASES[kind]
