"""GGUF files written here with PyPI's gguf and read back: weights, config, tokenizer, errors."""

import json

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxalign.hf import load_pretrained, load_tokenizer, save_pretrained
from jaxalign.hf.gguf_file import GGUFFile
from jaxalign.models.base import RopeConfig
from jaxalign.models.rope import rope_frequencies

BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WIDTH, HEADS, KV, HEAD, INNER, VOCAB = 64, 4, 2, 16, 96, 32


def weights(seed=0, bias=False):
    """HF names → float32 tensors of a two-layer model with a tied head."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name, shape in {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (HEADS * HEAD, WIDTH),
            "self_attn.k_proj": (KV * HEAD, WIDTH),
            "self_attn.v_proj": (KV * HEAD, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (INNER, WIDTH),
            "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        }.items():
            shapes[f"{layer}{name}.weight"] = shape
            if bias and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                shapes[f"{layer}{name}.bias"] = shape[:1]
    return {n: (0.2 * rng.standard_normal(s)).astype(np.float32) for n, s in shapes.items()}


def interleave(rows, heads):
    """HF's half-split rows → GGUF's interleaved rows: 2i is HF row i, 2i + 1 is HF row i + h."""
    out = np.empty_like(rows)
    size = len(rows) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = rows[head * size + i]
            out[head * size + 2 * i + 1] = rows[head * size + i + size // 2]
    return out


def write(path, tensors, arch="llama", quantise=(), metadata=(), extra=None):
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500.0)
    for add in metadata:
        add(writer)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for layer in range(2):
        names |= {f"model.layers.{layer}.{v}": f"blk.{layer}.{k}" for k, v in BLOCK.items()}
    for name, value in tensors.items():
        stem, _, kind = name.rpartition(".")
        if arch == "llama" and stem.endswith(("q_proj", "k_proj")):
            value = interleave(value, HEADS if stem.endswith("q_proj") else KV)
        target = f"{names[stem]}.{kind}"
        if name in quantise:
            quant = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(target, gguf.quants.quantize(value, quant), raw_dtype=quant)
        else:
            writer.add_tensor(target, value)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_all(path):
    file = GGUFFile(path)
    return {n: file.read(n, (slice(None),) * len(s)) for n, s in file.shapes.items()}


def test_float_and_quantised_tensors_come_back_under_hf_names(tmp_path):
    expected = weights()
    quantised = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight")
    got = read_all(write(tmp_path / "m.gguf", expected, quantise=quantised))
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name in quantised:  # 8 bits per block of 32: half a step is max / 127 / 2
            error = np.abs(got[name] - value).max()
            assert 0 < error <= np.abs(value).max() / 254 * 1.01
        else:
            np.testing.assert_array_equal(got[name], value)


def test_model_equals_the_same_weights_in_a_folder(tmp_path):
    from safetensors.numpy import save_file

    tensors = weights()
    model, params = load_pretrained(write(tmp_path / "m.gguf", tensors))
    config = model.config
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (2, 4, 2)
    assert (config.head_dim, config.max_positions, config.vocab_size) == (16, 128, 32)
    assert config.rope == RopeConfig(theta=500.0)
    assert config.norm_eps == 1e-5  # exact, although GGUF stores a float32
    assert config.tie_embeddings
    tokens = np.array([[3, 1, 4, 1, 5, 9, 2, 6]], np.int32)
    logits = np.asarray(model.logits(params, model.apply(params, tokens)))

    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    hf = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(hf))
    other, others = load_pretrained(folder)
    expected = np.asarray(other.logits(others, other.apply(others, tokens)))
    np.testing.assert_allclose(logits, expected, atol=1e-6, rtol=0)

    save_pretrained(model, params, tmp_path / "out")
    saved = json.loads((tmp_path / "out/config.json").read_text())
    assert saved["rms_norm_eps"] == 1e-5
    again, agains = load_pretrained(tmp_path / "out")
    got = np.asarray(again.logits(agains, again.apply(agains, tokens)))
    np.testing.assert_array_equal(got, logits)


def test_qwen2_rows_are_not_permuted(tmp_path):
    expected = weights(bias=True)
    path = write(tmp_path / "m.gguf", expected, arch="qwen2")
    got = read_all(path)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)
    model, _ = load_pretrained(path)
    assert model.config.qkv_bias
    assert not model.config.out_bias


def test_rope_scaling(tmp_path):
    linear = [
        lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR),
        lambda w: w.add_rope_scaling_factor(4.0),
    ]
    file = GGUFFile(write(tmp_path / "linear.gguf", weights(), metadata=linear))
    assert file.config["rope_parameters"] == {
        "rope_type": "linear",
        "rope_theta": 500.0,
        "factor": 4.0,
    }
    # Llama 3.1 files store a divisor per frequency: 1 below a wavelength of 2048, 8 above 8192.
    llama3 = RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192)
    divisors = rope_frequencies(RopeConfig(theta=500000.0), HEAD) / rope_frequencies(llama3, HEAD)
    assert divisors[0] == 1.0
    assert divisors[-1] == pytest.approx(8.0)
    base = [lambda w: w.add_key_value("llama.rope.freq_base", 500000.0, gguf.GGUFValueType.FLOAT32)]
    extra = {"rope_freqs.weight": divisors.astype(np.float32)}
    writer_base = [lambda w: w.kv_data[0].pop("llama.rope.freq_base"), *base]
    path = write(tmp_path / "llama3.gguf", weights(), metadata=writer_base, extra=extra)
    model, _ = load_pretrained(path)
    assert model.config.rope == llama3
    extra = {"rope_freqs.weight": np.linspace(1, 8, HEAD // 2, dtype=np.float32)}
    path = write(tmp_path / "odd.gguf", weights(), metadata=writer_base, extra=extra)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight does not follow Llama 3"):
        GGUFFile(path)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_expert_count(8), "expert_count=8 is not supported"),
        (lambda w: w.add_sliding_window(64), "sliding_window=64 is not supported"),
        (lambda w: w.add_uint16("split.count", 3), r"split\.count=3 is not supported"),
        (lambda w: w.add_rope_dimension_count(8), r"rope\.dimension_count=8.*whole head, 16"),
        (
            lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
            r"rope\.scaling\.type='yarn' is not supported",
        ),
        (lambda w: w.kv_data[0].pop("llama.block_count"), "block_count is missing"),
    ],
)
def test_unsupported_files_say_why(tmp_path, add, message):
    path = write(tmp_path / "m.gguf", weights(), metadata=[add])
    with pytest.raises(ValueError, match=message) as error:
        load_pretrained(path)
    assert str(path) in str(error.value)


def test_bad_files_say_why(tmp_path):
    path = write(tmp_path / "arch.gguf", {}, arch="mamba")
    with pytest.raises(ValueError, match=r"general\.architecture='mamba'.*llama, qwen2"):
        load_pretrained(path)
    tensors = weights()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    path = write(tmp_path / "m.gguf", tensors, extra={"blk.0.odd.weight": np.ones(4, np.float32)})
    with pytest.raises(ValueError, match=r"missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_pretrained(path)
    with pytest.raises(ValueError, match=r"unexpected: blk\.0\.odd\.weight"):
        load_pretrained(path)
    for name, data in {
        "text": b"not a model",
        "cut": path.read_bytes()[:3000],
        "empty": b"",
    }.items():
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}\.gguf is not a readable GGUF file"):
            load_pretrained(bad)


# --- tokenizers ----------------------------------------------------------------------------------

TEXTS = [
    "Hello world! It's 12345.67 tests, isn't it?\n\n  indented\tcode()",
    "今天天气很好，我们去公园吧。３４",
    "def f(x):\n    return x**2  # комментарий\r\n",
    "emoji 😀👍🏽🇫🇷 ½ ² e\u0301",
    "<|im_start|>user\nHi<|im_end|>\n",
    "  ",
    "",
]


def write_tokenizer(path, folder, pre, *, model="gpt2", extra=()):
    """A folder's tokenizer.json as GGUF metadata, in converters' form."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    tokens = {index: token for token, index in spec["model"]["vocab"].items()}
    types = dict.fromkeys(tokens, 1)
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = 3 if added["special"] else 4
    ids = {token: index for index, token in tokens.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([tokens[i] for i in range(len(tokens))])
    writer.add_token_types([types[i] for i in range(len(tokens))])
    merges = spec["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(ids[config["eos_token"]])
    writer.add_pad_token_id(ids[config["pad_token"]])
    if config["bos_token"] is not None:
        writer.add_bos_token_id(ids[config["bos_token"]])
    if config["unk_token"] is not None:
        writer.add_unk_token_id(ids[config["unk_token"]])
    writer.add_add_bos_token(False)
    writer.add_chat_template(config["chat_template"])
    for add in extra:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def shrink(folder, out, keep=3000):
    """A real tokenizer cut to its first merges: same rules, a hundredth of the time."""
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"] = spec["model"]["merges"][:keep]
    merged = {"".join(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]}
    added = {token["content"]: token for token in spec["added_tokens"]}
    old = spec["model"]["vocab"] | {content: token["id"] for content, token in added.items()}
    kept = [t for t in sorted(old, key=old.get) if len(t) == 1 or t in merged or t in added]
    new = {token: index for index, token in enumerate(kept)}
    for content, token in added.items():
        token["id"] = new[content]
    spec["model"]["vocab"] = {t: i for t, i in new.items() if t in spec["model"]["vocab"]}
    out.mkdir()
    (out / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("added_tokens_decoder", None)  # holds the old ids
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("smollm2-tokenizer", "smollm"),
        ("minimind-tokenizer", "gpt-2"),
        ("qwen3-tokenizer", "qwen2"),
    ],
)
def test_tokenizer_equals_the_original(shared, tmp_path, name, pre):
    folder = shrink(shared / "data" / name, tmp_path / "small")
    ours = load_tokenizer(write_tokenizer(tmp_path / "t.gguf", folder, pre))
    theirs = load_tokenizer(folder)
    for text in TEXTS:
        ids = theirs(text).input_ids
        assert ours(text).input_ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert len(ours) == len(theirs)
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.pad_token_id == theirs.pad_token_id != ours.eos_token_id
    assert ours.model_max_length == 128
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)


def test_llama_bpe_splits_digits_in_threes_and_adds_bos(tmp_path):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789'"
    tokens = [*letters, "Ġ", "12", "123", "ab", "<|begin|>", "<|end|>", "<|spare|>", "Ġab"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<|") else 1 for t in tokens])
    writer.add_token_merges(["1 2", "12 3", "a b"])
    writer.add_bos_token_id(tokens.index("<|begin|>"))
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer(tmp_path / "t.gguf")
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("ab12312 ab<|end|>").input_ids)
    # ignore_merges: "Ġab" is in the vocabulary without a merge, and is used
    assert pieces == ["<|begin|>", "ab", "123", "12", "Ġab", "<|end|>"]
    assert tokenizer.pad_token == "<|spare|>"


def test_sentencepiece_vocabulary_equals_the_original(shared, tmp_path):
    folder = shared / "data/stories260K/hf"
    spec = json.loads((folder / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    tokens = sorted(vocab, key=vocab.get)
    types = [2, 3, 3] + [6 if t.startswith("<0x") else 1 for t in tokens[3:]]
    # SentencePiece scores the merges −0, −1, … in the order learned, which is the order of ids.
    scores = [0.0 if kind != 1 else float(259 - i) for i, kind in enumerate(types)]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = load_tokenizer(tmp_path / "t.gguf"), load_tokenizer(folder)
    for text in ("Once upon a time, there was a little girl named Lily.", "emoji 😀", "a  b\nc 12"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours(text, add_special_tokens=False).input_ids == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours("Once").input_ids[0] == 1  # BOS by default
    assert ours.pad_token == "<unk>"


@pytest.mark.parametrize(
    ("model", "pre", "message"),
    [
        ("gpt2", "tekken", r"tokenizer\.ggml\.pre='tekken' is not supported; supported: gpt-2"),
        ("gpt2", "default", r"tokenizer\.ggml\.pre='default' is not supported"),
        ("bert", "x", r"tokenizer\.ggml\.model='bert' is not supported"),
    ],
)
def test_unknown_tokenizers_are_named(tmp_path, model, pre, message):
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(
            {
                "model": {"vocab": {"a": 0, "<e>": 1}, "merges": []},
                "added_tokens": [{"id": 1, "content": "<e>", "special": True}],
            }
        )
    )
    names = {"eos_token": "<e>", "pad_token": "<e>", "bos_token": None, "unk_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"chat_template": "x"}))
    path = write_tokenizer(tmp_path / "t.gguf", tmp_path, pre, model=model)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_qwen3_with_norms_of_queries_and_keys(tmp_path):
    tensors = weights(seed=5)
    rng = np.random.default_rng(6)
    for layer in range(2):
        for name in ("q_norm", "k_norm"):
            norm = (1 + 0.1 * rng.standard_normal(HEAD)).astype(np.float32)
            tensors[f"model.layers.{layer}.self_attn.{name}.weight"] = norm
    path = write(
        tmp_path / "m.gguf", tensors, arch="qwen3", metadata=[lambda w: w.add_key_length(HEAD)]
    )
    model, params = load_pretrained(path)
    assert (model.config.family, model.config.qk_norm) == ("qwen3", "head")
    save_pretrained(model, params, tmp_path / "out")
    saved = load_file(tmp_path / "out/model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, value in tensors.items():  # the file's row order: not interleaved
        np.testing.assert_array_equal(saved[name], value, name)
