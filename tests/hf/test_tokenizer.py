"""The padding token never equals EOS; errors for folders without a tokenizer."""

import json

import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from jaxalign.hf import load_tokenizer


def save(folder, specials, template=None, **names):
    """A word-level tokenizer with the given special tokens (ids from 2)."""
    vocab = {"a": 0, "b": 1} | {token: 2 + i for i, token in enumerate(specials)}
    core = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(list(specials))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, **names
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("specials", "template", "names", "pad"),
    [
        # kept
        (["<s>", "</s>", "<p>"], None, {"eos_token": "</s>", "pad_token": "<p>"}, "<p>"),
        # a token meant for padding, before unknown
        (["<u>", "</s>", "<|Pad|>"], None, {"eos_token": "</s>", "unk_token": "<u>"}, "<|Pad|>"),
        # unknown, before others
        (
            ["<x>", "</s>", "<u>"],
            None,
            {"eos_token": "</s>", "pad_token": "</s>", "unk_token": "<u>"},
            "<u>",
        ),
        # the first other one that is neither BOS nor EOS nor part of the chat format
        (
            ["<s>", "</s>", "<user>", "<x>", "<y>"],
            "<user>{{ messages[0].content }}",
            {"eos_token": "</s>", "bos_token": "<s>"},
            "<x>",
        ),
    ],
)
def test_padding_token(tmp_path, specials, template, names, pad):
    tokenizer = load_tokenizer(save(tmp_path, specials, template, **names))
    assert tokenizer.pad_token == pad
    assert tokenizer.pad_token_id == 2 + specials.index(pad)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == 2 + len(specials)


def test_any_id_can_pad_where_no_token_is_free(tmp_path):
    save(tmp_path, ["<s>", "</s>"], eos_token="</s>", bos_token="<s>", pad_token="</s>")
    assert load_tokenizer(tmp_path).pad_token == "</s>"
    # As GPT-2's own: one special token, which ends texts.
    save(tmp_path / "gpt2", ["<|endoftext|>"], eos_token="<|endoftext|>")
    assert load_tokenizer(tmp_path / "gpt2").pad_token is None
    # Marks of turns, which a template may write, are no padding.
    specials = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"]
    save(tmp_path / "base", specials, eos_token="<|endoftext|>")
    assert load_tokenizer(tmp_path / "base").pad_token == "<repo_name>"


def test_a_padding_token_without_a_row_is_not_used(tmp_path):
    folder = save(tmp_path, ["</s>", "<x>", "[PAD]"], eos_token="</s>", pad_token="[PAD]")
    assert load_tokenizer(folder).pad_token == "[PAD]"
    (folder / "config.json").write_text(json.dumps({"vocab_size": 4}))  # a, b, </s>, <x>
    assert load_tokenizer(folder).pad_token == "<x>"
    (folder / "config.json").write_text(json.dumps({"vocab_size": 3}))
    assert load_tokenizer(folder).pad_token is None


def test_what_the_source_stops_at_is_known(tmp_path):
    folder = save(tmp_path, ["</s>", "<x>"], eos_token="</s>")
    assert load_tokenizer(folder).source_stops == ()
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert load_tokenizer(folder).source_stops == (2,)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0]}))
    assert load_tokenizer(folder).source_stops == (2, 0)


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(
        ValueError, match=r"holds no tokenizer.*it is empty.*wanted tokenizer\.json"
    ):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_vocabulary_says_what_it_holds(tmp_path):
    folder = save(tmp_path / "whole", ["</s>"], eos_token="</s>")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"vocabulary; it holds .*tokenizer_config\.json.*wanted"):
        load_tokenizer(folder)


def test_hub_id_downloads_tokenizer_files_only(tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    save(tmp_path, ["<s>", "</s>", "<p>"], eos_token="</s>", pad_token="<p>")

    def snapshot_download(repo, *, revision, allow_patterns):
        calls.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_tokenizer("org/name").pad_token == "<p>"
    assert not any("safetensors" in pattern for pattern in calls)


def test_real_tokenizers(shared):
    """The folders' own tokenizers, except that SmolLM2's padding is moved off its EOS."""
    for name, pad in (
        ("smollm2-tokenizer", "<|endoftext|>"),
        ("qwen3-tokenizer", "<|endoftext|>"),
        ("minimind-tokenizer", "<|endoftext|>"),
        ("stories260K/hf", "<unk>"),
    ):
        folder = shared / "data" / name
        tokenizer = load_tokenizer(folder)
        assert tokenizer.pad_token == pad
        core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        text = "Hello, 你好 1234 😀\n  x"
        assert tokenizer(text, add_special_tokens=False).input_ids == (
            core.encode(text, add_special_tokens=False).ids
        )
        config = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer.eos_token == config["eos_token"]
