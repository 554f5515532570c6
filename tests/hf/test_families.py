"""config.json of transformers 4 and 5 ↔ DecoderConfig; unsupported values are refused by name."""

import dataclasses
import json

import families
import jax
import jax.numpy as jnp
import pytest

from jaxalign.hf.families import (
    FAMILIES,
    GENERATION,
    attributes_of,
    config_from_hf,
    config_to_hf,
    flatten,
    is_scorer,
    leaves,
    unflatten,
)
from jaxalign.models.base import LORA_TARGETS, DecoderConfig, LoraConfig, RopeConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_absent_and_null_keys_take_the_defaults_of_transformers():
    config = config_from_hf(LLAMA | {"num_key_value_heads": None, "head_dim": None})
    assert dataclasses.replace(config, source_config="") == DecoderConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_layers=3,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        rope=RopeConfig(theta=10000.0),
        norm_eps=1e-6,
        tie_embeddings=False,
        max_positions=2048,
        family="llama",
    )
    hash(config)  # models are static arguments of jit


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 5e5}, RopeConfig(theta=5e5)),
        ({"rope_theta": 5e5, "rope_scaling": None}, RopeConfig(theta=5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(kind="linear", factor=2.0)),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
            RopeConfig(theta=5e5, kind="llama3", factor=8.0),
        ),
        ({"rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}}, RopeConfig(theta=7.0)),
        (
            {"rope_parameters": {"rope_theta": 7.0, "rope_type": "llama3", **LLAMA3}},
            RopeConfig(theta=7.0, kind="llama3", factor=8.0),
        ),
    ],
)
def test_rope_in_old_and_new_form(keys, rope):
    config = config_from_hf(LLAMA | keys)
    assert config.rope == rope
    # Both forms are written; each alone must read back the same.
    hf = config_to_hf(config, scorer=False, dtype="float32")
    old = {k: v for k, v in hf.items() if k != "rope_parameters"}
    new = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(old).rope == config_from_hf(new).rope == rope


def test_biases_by_family():
    llama = config_from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (llama.qkv_bias, llama.out_bias, llama.mlp_bias) == (True, True, True)
    qwen = config_from_hf(LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]})
    assert (qwen.qkv_bias, qwen.out_bias, qwen.mlp_bias) == (True, False, False)
    assert config_to_hf(qwen, scorer=True, dtype="float32")["architectures"] == [
        "Qwen2ForSequenceClassification"
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt_bigcode"}, r"model_type='gpt_bigcode'.*supported: 'llama', 'smollm3'"),
        ({"model_type": None}, "model_type=None"),
        ({"hidden_act": "relu"}, "hidden_act='relu'.*supported: 'silu'"),
        ({"rope_scaling": {"rope_type": "axial", "factor": 2.0}}, "rope_type='axial'.*'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor=None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\]: wanted an object"),
        ({"rope_theta": 0}, "rope_theta=0: wanted a positive number"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"sliding_window": 4096}, "sliding_window=4096.*full attention"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "rope_parameters=.*the same for all layers",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3},
            "layer_types has 'sliding_attention', but no sliding_window",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3},
            "layer_types.*chunked_attention",
        ),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention=True",
        ),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [1]},
            r"mlp_only_layers=\[1\].*every",
        ),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "short_factor=None"),
        ({"attention_bias": "yes"}, "attention_bias='yes': wanted true or false"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types.*sliding_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "32"}, "hidden_size='32': wanted a positive integer"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"rms_norm_eps": -1}, "rms_norm_eps=-1"),
    ],
)
def test_unsupported_features_are_refused_by_name(keys, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(LLAMA | keys)


def test_unused_sliding_window_is_accepted():
    keys = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 32768}
    config = config_from_hf(LLAMA | keys)
    hf = config_to_hf(config, scorer=False, dtype="float32")
    assert hf["sliding_window"] == 32768
    assert hf["use_sliding_window"] is False


def test_architectures():
    scorer = {"architectures": ["LlamaForSequenceClassification"]}
    assert not is_scorer(LLAMA)
    assert is_scorer(LLAMA | scorer)
    assert is_scorer(LLAMA | scorer | {"id2label": {"0": "LABEL_0"}})
    assert is_scorer(LLAMA | scorer | {"num_labels": 3})
    with pytest.raises(ValueError, match=r"architectures=\['LlamaForTokenClassification'\]"):
        is_scorer(LLAMA | {"architectures": ["LlamaForTokenClassification"]})


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        ({}, ()),
        ({"num_labels": 1}, ()),
        ({"id2label": {"0": "LABEL_0"}}, ()),
        ({"id2label": {"0": "helpfulness"}, "num_labels": 1}, ("helpfulness",)),
        ({"num_labels": 2}, ("LABEL_0", "LABEL_1")),
        ({"id2label": {"1": "b", "0": "a"}, "problem_type": "regression"}, ("a", "b")),
        ({"id2label": {0: "a", 1: "b"}}, ("a", "b")),
    ],
)
def test_labels_are_attributes(keys, names):
    assert attributes_of(LLAMA | keys) == names


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels=3"),
        (
            {"id2label": {"0": "bad", "1": "good"}, "problem_type": "single_label_classification"},
            "problem_type='single_label_classification'",
        ),
    ],
)
def test_labels_of_a_classification_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        attributes_of(LLAMA | keys)


def test_attributes_are_written_as_labels_of_a_regression():
    config = config_from_hf(LLAMA | {"problem_type": "single_label_classification"})
    hf = config_to_hf(config, scorer=True, dtype="float32", attributes=("kind", "long"))
    assert hf["num_labels"] == 2
    assert hf["id2label"] == {"0": "kind", "1": "long"}
    assert hf["label2id"] == {"kind": 0, "long": 1}
    assert hf["problem_type"] == "regression"
    assert attributes_of(hf) == ("kind", "long")
    assert "problem_type" not in config_to_hf(config, scorer=True, dtype="float32")


def test_unknown_keys_survive_a_round_trip():
    source = LLAMA | {
        "eos_token_id": [1, 2],
        "initializer_range": 0.5,
        "torch_dtype": "bfloat16",
        "layer_types": ["full_attention"] * 3,
        GENERATION: {"top_p": 0.9},
    }
    config = config_from_hf(source)
    hf = config_to_hf(config, scorer=False, dtype="float32")
    assert hf["eos_token_id"] == [1, 2]
    assert hf["initializer_range"] == 0.5
    assert hf["layer_types"] == ["full_attention"] * 3
    assert hf["dtype"] == "float32"
    assert "torch_dtype" not in hf
    assert GENERATION not in hf
    json.dumps(hf)
    shorter = dataclasses.replace(config, num_layers=2)
    hf = config_to_hf(shorter, scorer=True, dtype="float32")
    assert hf["num_hidden_layers"] == 2
    assert "layer_types" not in hf
    assert hf["id2label"] == {"0": "LABEL_0"}
    # A scorer exported as a language model loses the label.
    back = config_to_hf(config_from_hf(hf), scorer=False, dtype="float32")
    assert "id2label" not in back
    assert back["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.parametrize(
    "fields",
    [
        {"out_bias": True},
        {"window": 4},
        {"qk_norm": "head"},
        {"logit_softcap": 30.0},
        {"family": "qwen2"},
        {"family": "mistral", "mlp_bias": True},
        {"rope_layers": (True, False, True)},
    ],
)
def test_configs_that_a_family_cannot_express_are_refused(fields):
    config = dataclasses.replace(config_from_hf(LLAMA), **fields)
    lost = next((name for name in fields if name != "family"), "qkv_bias")
    with pytest.raises(ValueError, match=rf"{config.family}.*cannot express.*{lost}="):
        config_to_hf(config, scorer=False, dtype="float32")


OLD = {
    "gemma3_text": {"rope_theta": 5e5, "rope_local_base_freq": 77.0, "sliding_window_pattern": 3},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "mistral": {"sliding_window": None, "rope_theta": 1e6},
    "phi3": {
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "max_position_embeddings": 128,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [2.0, 3.0]},
    },
    "qwen3": {
        "head_dim": 8,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


@pytest.mark.parametrize("kind", OLD)
def test_older_configs_read_as_transformers_reads_them(kind):
    """Configs of transformers 4 read like those of transformers 5."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch", reason="transformers' configs are checked with torch")
    keys = {k: v for k, v in LLAMA.items() if k != "architectures"} | OLD[kind]
    keys |= {"model_type": kind, "num_key_value_heads": 2}
    written = transformers.AutoConfig.for_model(**json.loads(json.dumps(keys))).to_dict()
    new = {k: v for k, v in written.items() if k not in ("architectures", "torch_dtype")}
    old, again = config_from_hf(keys), config_from_hf(new)
    assert dataclasses.replace(old, source_config="") == dataclasses.replace(
        again, source_config=""
    )
    written = config_to_hf(old, scorer=False, dtype="float32")
    for hidden in (("rope_parameters",), ("rope_scaling", "rope_theta", "rope_local_base_freq")):
        part = {k: v for k, v in written.items() if k not in hidden}
        assert dataclasses.replace(config_from_hf(part), source_config="") == dataclasses.replace(
            old, source_config=""
        )


def test_key_table():
    config = config_from_hf(LLAMA | {"attention_bias": True})
    found = {leaf.path: leaf for leaf in leaves(config, Decoder(config).shapes)}
    up = found["blocks/mlp/up/kernel"]
    assert up.shape == (3, 32, 48)
    assert up.tensor_shape == (48, 32)
    assert up.names[2] == "model.layers.2.mlp.up_proj.weight"
    assert found["blocks/attention/out/bias"].names[0] == "model.layers.0.self_attn.o_proj.bias"
    assert found["embed/embedding"].names == ("model.embed_tokens.weight",)
    assert found["embed/embedding"].tensor_shape == (96, 32)
    assert found["head/kernel"].tensor_shape == (96, 32)
    scorer = {leaf.path: leaf for leaf in leaves(config, Scorer(Decoder(config)).shapes)}
    assert scorer["score/kernel"].tensor_shape == (1, 32)
    assert "head/kernel" not in scorer
    adapted = {"blocks": {"mlp": {"up": {"lora_a": jax.ShapeDtypeStruct((3, 32, 2), "float32")}}}}
    with pytest.raises(ValueError, match=r"lora_a has no Hugging Face name.*merge_lora"):
        leaves(config, adapted)


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten({"a/b": 1, "a/c/d": 2, "e": 3}) == tree


@pytest.mark.parametrize("kind", families.CASES)
def test_adapters_and_rematerialisation_fit_every_family(kind):
    """Shapes only: adapters on all projections of a family, under a gradient."""
    config = config_from_hf({"model_type": kind, **families.keys(kind)})
    plain = Decoder(config)
    model = dataclasses.replace(
        plain, lora=LoraConfig(rank=2), remat="block", compute_dtype="bfloat16"
    )
    found, base = flatten(model.shapes), flatten(plain.shapes)
    adapted = {path.rsplit("/", 2)[1] for path in found if path.endswith("lora_a")}
    assert adapted == set(LORA_TARGETS) - (set() if config.gated_mlp else {"gate"})
    assert {path for path in found if "lora_" not in path} == set(base)
    assert all(
        len(model_axes.split()) == len(found[path].shape)
        for path, model_axes in flatten(model.axes).items()
    )
    ids = jax.ShapeDtypeStruct((2, 8), "int32")

    def loss(params, ids):
        return jnp.sum(model.apply(params, ids), dtype="float32")

    grads = jax.eval_shape(jax.grad(loss), model.shapes, ids)
    assert {path: x.shape for path, x in flatten(grads).items()} == {
        path: x.shape for path, x in found.items()
    }


def test_every_family_has_a_case():
    assert set(families.CASES) == set(FAMILIES)
