"""GGUF files that are written: read by PyPI's gguf and by `load_pretrained`, weight by weight."""

import dataclasses

import chatmodel
import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from test_gguf import interleave, shrink
from texts import strings
from tokenizers import models, normalizers, pre_tokenizers

from jaxalign.hf import load_pretrained, load_tokenizer
from jaxalign.hf.gguf_vocabulary import tokenizer_metadata
from jaxalign.hf.gguf_write import save_gguf
from jaxalign.models.base import DecoderConfig, RopeConfig
from jaxalign.models.decoder import Decoder
from jaxalign.models.scorer import Scorer

# Widths of 64: two blocks of Q8_0; an inner width of 48, which is no multiple of a block.
LLAMA = DecoderConfig(
    vocab_size=300,  # 40 more than the tokenizer has
    hidden_size=64,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    norm_eps=1e-5,
    tie_embeddings=True,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    max_positions=512,
    rope=RopeConfig(theta=500000.0, kind="llama3", factor=8.0, original_max_positions=8192),
)
PLAIN = dataclasses.replace(
    LLAMA, tie_embeddings=False, qkv_bias=False, out_bias=False, mlp_bias=False, rope=RopeConfig()
)
CONFIGS = {
    "llama": LLAMA,
    "mistral": dataclasses.replace(
        PLAIN, family="mistral", head_dim=8, rope=RopeConfig(kind="linear", factor=2.5)
    ),
    "qwen2": dataclasses.replace(PLAIN, family="qwen2", qkv_bias=True, norm_eps=1e-6),
    "qwen3": dataclasses.replace(
        PLAIN, family="qwen3", qk_norm="head", head_dim=32, rope=RopeConfig(theta=1e6)
    ),
}


def made(family):
    model = Decoder(CONFIGS[family])
    return model, tiny.random_params(model, seed=11)


def by_gguf(path):
    """GGUF name → (element type, values) by the package's own reader."""
    return {
        tensor.name: (
            tensor.tensor_type.name,
            gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_and_config_come_back(family, tmp_path):
    model, params = made(family)
    path = tmp_path / "m.gguf"
    save_gguf(model, params, path, tokenizer=chatmodel.make_tokenizer(), dtype="F32")
    again, loaded = load_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, params, loaded)
    config, expected = again.config, model.config
    for name in (
        "rope",
        "norm_eps",
        "max_positions",
        "qk_norm",
        "qkv_bias",
        "mlp_bias",
        "head_dim",
    ):
        assert getattr(config, name) == getattr(expected, name), name
    # The architecture's own row order, by the package's reader: interleaved in llama alone.
    query = np.asarray(params["blocks"]["attention"]["query"]["kernel"])[1].T
    kind, stored = by_gguf(path)["blk.1.attn_q.weight"]
    assert kind == "F32"
    rows = interleave(query, 4) if family in ("llama", "mistral") else query
    np.testing.assert_array_equal(stored, rows)
    assert not np.array_equal(interleave(query, 4), query)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "Q8_0"])
def test_matrices_are_rounded_and_vectors_are_not(dtype, tmp_path):
    model, params = made("qwen2")
    path = tmp_path / "m.gguf"
    wide = save_gguf(model, params, path, tokenizer=chatmodel.make_tokenizer(), dtype=dtype)
    assert wide == (["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"] if dtype == "Q8_0" else [])
    stored = by_gguf(path)
    up = np.asarray(params["blocks"]["mlp"]["up"]["kernel"])[0].T
    down = np.asarray(params["blocks"]["mlp"]["down"]["kernel"])[1].T
    bias = np.asarray(params["blocks"]["attention"]["query"]["bias"])[0]
    kind, values = stored["blk.0.ffn_up.weight"]
    assert kind == dtype
    if dtype == "Q8_0":
        # Half a step of a block of 32, and what its scale loses in half precision.
        largest = np.abs(up.reshape(48, 2, 32)).max(-1, keepdims=True)
        error = np.abs(values - up).reshape(48, 2, 32)
        assert error.max() > 0
        assert np.all(error <= largest / 254 + largest * 2.0**-10)
        assert stored["blk.1.ffn_down.weight"][0] == "F16"
        np.testing.assert_array_equal(
            stored["blk.1.ffn_down.weight"][1], down.astype(np.float16).astype(np.float32)
        )
    else:
        narrow = {"F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
        np.testing.assert_array_equal(values, up.astype(narrow).astype(np.float32))
    assert stored["blk.0.attn_q.bias"][0] == "F32"
    np.testing.assert_array_equal(stored["blk.0.attn_q.bias"][1], bias)
    again, loaded = load_pretrained(path)
    ids = np.arange(40, dtype=np.int32).reshape(2, 20)
    exact = jax.nn.log_softmax(model.logits(params, model.apply(params, ids)))
    got = jax.nn.log_softmax(again.logits(loaded, again.apply(loaded, ids)))
    apart = float(np.abs(np.asarray(exact - got)).mean())
    assert 0 < apart < {"F16": 0.002, "BF16": 0.02, "Q8_0": 0.02}[dtype]


def test_metadata_is_what_llama_cpp_reads(tmp_path):
    model, params = made("llama")
    path = tmp_path / "m.gguf"
    save_gguf(model, params, path, tokenizer=chatmodel.make_tokenizer(), dtype="F16", name="Tiny")
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "llama"
    assert keys["general.name"] == "Tiny"
    assert keys["general.file_type"] == gguf.LlamaFileType.MOSTLY_F16
    assert keys["llama.rope.dimension_count"] == keys["llama.attention.key_length"] == 16
    assert keys["llama.vocab_size"] == len(keys["tokenizer.ggml.tokens"]) == 300
    assert keys["tokenizer.ggml.tokens"][299] == "[PAD299]"
    assert keys["tokenizer.ggml.token_type"][299] == gguf.TokenType.UNUSED
    assert keys["tokenizer.ggml.token_type"][1] == gguf.TokenType.CONTROL  # <|im_start|>
    assert keys["tokenizer.chat_template"] == chatmodel.CHATML
    assert keys["tokenizer.ggml.eos_token_id"] == 3
    assert keys["tokenizer.ggml.add_bos_token"] is False
    # Llama 3's scaling is a divisor for each frequency: 1 for the shortest wavelength, and the
    # factor for those above the original context.
    (divisors,) = (t.data for t in reader.tensors if t.name == "rope_freqs.weight")
    assert divisors.shape == (8,)
    assert divisors[0] == 1
    assert divisors[-1] == pytest.approx(8)


# --- tokenizers ----------------------------------------------------------------------------------


def through_gguf(tok, tmp_path):
    """The tokenizer that comes out of a file with this one in it."""
    config = dataclasses.replace(PLAIN, vocab_size=len(tok) + 3)
    model = Decoder(config)
    path = tmp_path / "t.gguf"
    save_gguf(model, tiny.random_params(model), path, tokenizer=tok, dtype="Q8_0")
    return load_tokenizer(path), gguf.GGUFReader(path)


@pytest.mark.parametrize(
    ("name", "pre"),
    [
        ("smollm2-tokenizer", "smollm"),
        ("minimind-tokenizer", "gpt-2"),
        ("qwen3-tokenizer", "qwen2"),
    ],
)
def test_tokenizers_keep_their_ids(shared, tmp_path, name, pre):
    tok = load_tokenizer(shrink(shared / "data" / name, tmp_path / "small", keep=1500))
    again, reader = through_gguf(tok, tmp_path)
    assert reader.get_field("tokenizer.ggml.pre").contents() == pre
    texts = [*strings(300), "<|im_start|>user\nHi<|im_end|>", " <|endoftext|> ", ""]
    assert again(texts).input_ids == tok(texts).input_ids
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert again.apply_chat_template(chat) == tok.apply_chat_template(chat)
    assert (again.eos_token, again.bos_token) == (tok.eos_token, tok.bos_token)
    assert again.decode(tok(texts[0]).input_ids) == tok.decode(tok(texts[0]).input_ids)


def test_sentencepiece_keeps_its_ids(shared, tmp_path):
    tok = load_tokenizer(shared / "data/stories260K/hf")
    again, reader = through_gguf(tok, tmp_path)
    assert reader.get_field("tokenizer.ggml.model").contents() == "llama"
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[:4] == [2, 3, 3, 6]  # unknown, two of control, the first byte
    texts = [*strings(300), "Once upon a time, there was a little girl named Lily.", "a  b\nc 12"]
    assert again(texts).input_ids == tok(texts).input_ids


def test_words_of_the_vocabulary_stay_whole_where_merges_are_ignored(tmp_path):
    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for token in ("ab", "Ġab", "12", "123"):
        vocab[token] = len(vocab)
    core = tokenizers.Tokenizer(
        models.BPE(vocab, [("a", "b"), ("1", "2"), ("12", "3")], ignore_merges=True)
    )
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    pattern += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = tokenizers.decoders.ByteLevel()
    core.add_special_tokens(["<|begin|>", "<|end|>"])
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", len(vocab))]
    )
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin|>", eos_token="<|end|>"
    )
    again, reader = through_gguf(tok, tmp_path)
    assert reader.get_field("tokenizer.ggml.pre").contents() == "llama-bpe"
    assert reader.get_field("tokenizer.ggml.add_bos_token").contents() is True
    ids = again("ab ab 12312").input_ids
    assert ids == tok("ab ab 12312").input_ids
    assert again.convert_ids_to_tokens(ids)[:3] == ["<|begin|>", "ab", "Ġab"]


def unigram():
    core = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="a")


def lowercased():
    tok = chatmodel.make_tokenizer()
    tok.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tok


def greedy():
    tok = chatmodel.make_tokenizer()
    token = tokenizers.AddedToken("<x>", lstrip=True, special=True)
    tok.add_special_tokens({"additional_special_tokens": [token]})
    return tok


@pytest.mark.parametrize(
    ("make", "rows", "message"),
    [
        (unigram, 300, r"is Unigram; GGUF is written for byte-level BPE.*SentencePiece"),
        (lowercased, 300, r"Hello world!.* would get other ids; what can be written is"),
        (greedy, 300, r"'a <x> b.* would get other ids"),
        (
            chatmodel.make_tokenizer,
            200,
            r"'.' \(200\).* has no row in the model's embedding of 200",
        ),
    ],
)
def test_tokenizers_that_cannot_be_written_are_named(make, rows, message):
    with pytest.raises(ValueError, match=message):
        tokenizer_metadata(make(), rows, "llama", 128)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "olmo2"}, r"family 'olmo2' cannot be written: .* llama and mistral, qwen2"),
        ({"family": "mistral", "window": 8}, "sliding window 8 cannot be written"),
        ({"rope": RopeConfig(kind="yarn", factor=4.0)}, "rope 'yarn' cannot be written"),
        (
            {"rope": dataclasses.replace(LLAMA.rope, original_max_positions=64)},
            r"original positions \(1\.0, 4\.0, 64\) cannot be written",
        ),
        ({"family": "qwen3", "qk_norm": "head", "qkv_bias": True}, "biases of attention in qwen3"),
    ],
)
def test_architectures_that_cannot_be_written_are_named(tmp_path, change, message):
    model = Decoder(dataclasses.replace(PLAIN, **change))
    with pytest.raises(ValueError, match=message):
        save_gguf(model, {}, tmp_path / "m.gguf", tokenizer=chatmodel.make_tokenizer())
    with pytest.raises(ValueError, match="a reward model or critic has no GGUF form"):
        save_gguf(Scorer(model), {}, tmp_path / "m.gguf", tokenizer=chatmodel.make_tokenizer())


def test_a_value_that_does_not_fit_leaves_nothing(tmp_path):
    model, params = made("mistral")
    tok = chatmodel.make_tokenizer()
    kernel = params["blocks"]["mlp"]["up"]["kernel"]
    params["blocks"]["mlp"]["up"]["kernel"] = kernel.at[1, 3, 5].set(1e8)
    for dtype in ("F16", "Q8_0"):
        with pytest.raises(ValueError, match=rf"up_proj\.weight holds values that {dtype} cannot"):
            save_gguf(model, params, tmp_path / "m.gguf", tokenizer=tok, dtype=dtype)
    params["blocks"]["mlp"]["up"]["kernel"] = kernel.at[0, 0, 0].set(np.nan)
    with pytest.raises(ValueError, match="Q8_0 cannot"):
        save_gguf(model, params, tmp_path / "m.gguf", tokenizer=tok, dtype="Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_only_a_gguf_file_is_replaced(tmp_path):
    model, params = made("mistral")
    tok, path = chatmodel.make_tokenizer(), tmp_path / "m.gguf"
    path.write_text("my notes")
    with pytest.raises(ValueError, match=r"m\.gguf is there and no GGUF file"):
        save_gguf(model, params, path, tokenizer=tok)
    assert path.read_text() == "my notes"
    path.unlink()
    for dtype in ("F32", "F16"):
        save_gguf(model, params, path, tokenizer=tok, dtype=dtype)
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert by_gguf(path)["blk.0.ffn_up.weight"][0] == "F16"
    with pytest.raises(ValueError, match=r"gguf dtype='Q4_1': wanted one of F32, F16, BF16, Q8_0"):
        save_gguf(model, params, path, tokenizer=tok, dtype="Q4_1")


def test_named_templates_and_further_ends_are_in_the_file(tmp_path):
    tok = chatmodel.make_tokenizer()
    tok.chat_template = {"default": chatmodel.CHATML, "tool_use": "{{ 1 }}"}
    tok.source_stops = (2, 3)
    again, reader = through_gguf(tok, tmp_path)
    assert reader.get_field("tokenizer.chat_template.tool_use").contents() == "{{ 1 }}"
    assert again.chat_template == chatmodel.CHATML
    assert set(again.source_stops) == {2, 3}
