"""Adapters as GGUF files: as llama.cpp adds them to the base, and read again."""

import dataclasses

import chatmodel
import gguf
import jax
import numpy as np
import pytest
import tiny
from test_gguf_write import CONFIGS, by_gguf

from jaxalign.hf import load_adapter, load_pretrained
from jaxalign.hf.gguf_lora import save_gguf_adapter
from jaxalign.hf.gguf_write import save_gguf
from jaxalign.models.base import combine
from jaxalign.models.decoder import Decoder
from jaxalign.models.lora import LoraConfig, add_lora, merge_lora

# A scale of its own for every kind of matrix, and a rank of its own in one layer.
RICH = LoraConfig(
    rank=4,
    alpha=6.0,
    targets=("query", "key", "down", "embed", "lm_head"),
    rank_pattern={r"layers\.1\.attention\.query": 2},
    alpha_pattern={"key": 5.0},
    rslora=True,
)


def adapted(family, lora=RICH):
    """(base, its parameters, model with adapters that say something, base and adapters)."""
    base = Decoder(dataclasses.replace(CONFIGS[family], vocab_size=300))
    params = tiny.random_params(base, seed=11)
    model, trained, frozen = add_lora(base, params, jax.random.key(0), lora)
    noise = tiny.random_params(model, seed=7)

    def drawn(node, other):
        return {
            k: drawn(v, other[k]) if isinstance(v, dict) else v + 0.2 * other[k]
            for k, v in node.items()
        }

    drawn_adapters = drawn(trained, noise)
    query = drawn_adapters["blocks"]["attention"].get("query")
    if query is not None:  # columns that the second layer does not have stay 0
        query["lora_a"] = query["lora_a"].at[1, :, 2:].set(0)
    return base, params, model, combine(drawn_adapters, frozen)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_llama_cpp_makes_the_merged_model_of_it(family, tmp_path):
    """W + α/r · B·A, added tensor by tensor to the base's file, gives the merged model's file."""
    base, params, model, together = adapted(family)
    tok = chatmodel.make_tokenizer()
    save_gguf(base, params, tmp_path / "base.gguf", tokenizer=tok, dtype="F32")
    save_gguf(*merge_lora(model, together), tmp_path / "merged.gguf", tokenizer=tok, dtype="F32")
    save_gguf_adapter(model, together, tmp_path / "a.gguf", name="Kind", base="Tiny")

    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "adapter"
    assert keys["adapter.type"] == "lora"
    assert keys["general.architecture"] == ("llama" if family == "mistral" else family)
    assert (keys["general.name"], keys["general.base_model.0.name"]) == ("Kind", "Tiny")
    stored = {t.name: np.array(t.data) for t in reader.tensors}
    assert stored["blk.1.attn_q.weight.lora_a"].shape == (2, 64)
    alpha, changed = keys["adapter.lora.alpha"], set()
    values, merged = (by_gguf(tmp_path / f"{name}.gguf") for name in ("base", "merged"))
    for name, (_, value) in values.items():
        if f"{name}.lora_a" in stored:
            a, b = (stored.pop(f"{name}.lora_{part}").astype(np.float64) for part in "ab")
            a = a.T if name == "token_embd.weight" else a  # get_rows reads it by its rows
            delta = alpha / b.shape[1] * (b @ a)
            value = value + (delta.T if name == "token_embd.weight" else delta)
            changed.add(name.split(".")[-2])
        np.testing.assert_allclose(merged[name][1], value, atol=2e-6, err_msg=name)
    assert not stored
    assert changed == {"attn_q", "attn_k", "ffn_down", "token_embd", "output"}


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_it_is_read_onto_its_base(family, tmp_path):
    base, params, model, together = adapted(family)
    tok = chatmodel.make_tokenizer()
    save_gguf(base, params, tmp_path / "base.gguf", tokenizer=tok, dtype="F32")
    save_gguf_adapter(model, together, tmp_path / "a.gguf")
    again, trained, frozen = load_adapter(base, params, tmp_path / "a.gguf")
    assert again.lora is not None
    _, expected = merge_lora(model, together)
    _, got = merge_lora(again, combine(trained, frozen))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), got, expected)
    _, got = load_pretrained(tmp_path / "a.gguf", base=tmp_path / "base.gguf")
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), got, expected)


def test_a_file_of_half_precision_without_alpha_is_read(tmp_path):
    """As `convert_lora_to_gguf.py --outtype f16` writes; α = 0 is a scale of 1."""
    base, params = Decoder(CONFIGS["qwen2"]), None
    params = tiny.random_params(base, seed=11)
    a, b = (np.random.default_rng(i).normal(size=s) for i, s in enumerate([(3, 64), (64, 3)]))
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 0.0)
    for part, value in (("a", a), ("b", b)):
        writer.add_tensor(f"blk.1.attn_q.weight.lora_{part}", value.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model, trained, frozen = load_adapter(base, params, tmp_path / "a.gguf")
    _, merged = merge_lora(model, combine(trained, frozen))
    got = np.asarray(merged["blocks"]["attention"]["query"]["kernel"])
    before = np.asarray(params["blocks"]["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(got[0], before[0])
    np.testing.assert_allclose(got[1] - before[1], (b @ a).T, atol=2e-2)


def test_what_has_no_form_there_is_refused(tmp_path):
    tied = LoraConfig(rank=2, targets=("embed",))
    for lora, family, message in (
        (LoraConfig(rank=2, dora=True), "qwen2", "dora=true have no GGUF form"),
        (LoraConfig(rank=2, init="pissa"), "qwen2", "init=pissa"),
        (LoraConfig(rank=2, modules_to_save=("norm",)), "qwen2", "modules_to_save"),
        (tied, "llama", "a tied embedding or head"),
    ):
        base = Decoder(CONFIGS[family])
        params = tiny.random_params(base, seed=1)
        model, trained, frozen = add_lora(base, params, jax.random.key(0), lora)
        with pytest.raises(ValueError, match=message):
            save_gguf_adapter(model, combine(trained, frozen), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_named(tmp_path):
    base, params, model, together = adapted("mistral")
    path = tmp_path / "a.gguf"
    save_gguf_adapter(model, together, path)
    narrow = Decoder(dataclasses.replace(base.config, hidden_size=32))
    with pytest.raises(ValueError, match=r"does not fit the base: [AB] of \S+ has the shape"):
        load_adapter(narrow, tiny.random_params(narrow), path)
    short = Decoder(dataclasses.replace(base.config, num_layers=1))
    with pytest.raises(ValueError, match=r"does not fit the base: model\.layers\.1\.\S+ is no mod"):
        load_adapter(short, tiny.random_params(short), path)
    other = Decoder(CONFIGS["qwen3"])
    with pytest.raises(ValueError, match=r"architecture 'llama', and the base is .* 'qwen3'"):
        load_adapter(other, tiny.random_params(other), path)
    with pytest.raises(ValueError, match="holds an adapter and no whole model; give its base"):
        load_pretrained(path)
    tok = chatmodel.make_tokenizer()
    save_gguf(base, params, tmp_path / "base.gguf", tokenizer=tok)
    with pytest.raises(ValueError, match=r"general\.type='model', wanted 'adapter'"):
        load_adapter(base, params, tmp_path / "base.gguf")
